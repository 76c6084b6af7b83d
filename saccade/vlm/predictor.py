"""Answers through Lightning: a benchmark's questions shared by devices and nodes, each answered once.

    table = AnswerTable("answers.jsonl", questions, plan)
    trainer = Trainer(devices=4, strategy="ddp", callbacks=[table], logger=False)
    trainer.predict(AnswerPredictor(plan), QuestionData(questions, table), return_predictions=False)

:func:`predict_answers` does just this. The table has the rows of :func:`saccade.vlm.generate_answers`, and so has its
journal: a run that was interrupted, on any number of processes, goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from PIL import Image
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from saccade.attention import use_backend
from saccade.batch import BatchOptions, Item, Run, RunSummary, resolve_device, resolve_precision, seed_everything
from saccade.errors import ConfigError, DataError
from saccade.vlm.answer_run import AnswerPlan, answer_batch, items_of, try_image
from saccade.vlm.questions import Question

__all__ = ["AnswerPredictor", "AnswerTable", "QuestionData", "predict_answers"]

ACCELERATORS = {"auto": "auto", "cpu": "cpu", "cuda": "gpu", "mps": "mps"}

Asked = tuple[Question, Image.Image | DataError]
Entry = dict[str, Any]


class Collected:
    """What became of the questions of a batch, as entries of a part."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []

    def done(self, item: Item, *, seconds: float, row: dict[str, Any]) -> None:
        """Take an answer."""
        self.entries.append({"id": item.id, "seconds": seconds, "row": row})

    def fail(self, item: Item, error: Exception, *, seconds: float = 0.0) -> None:
        """Take the reason why there is none."""
        reason = error.reason if isinstance(error, DataError) else type(error).__name__
        self.entries.append({"id": item.id, "seconds": seconds, "error": str(error), "reason": reason})


class AnswerPredictor(LightningModule):
    """A model that answers batches of questions; ``predict_step`` returns a list with an entry for each.

    Args:
        plan: Model, method and way of writing.
        dtype: Of the weights.
        attention_backend: Of saccade's own operators.

    Raises:
        ConfigError: If the method does not fit the model; see :meth:`saccade.vlm.AnswerPlan.answerer`.
    """

    def __init__(
        self, plan: AnswerPlan, *, dtype: torch.dtype = torch.float32, attention_backend: str = "auto"
    ) -> None:
        super().__init__()
        self.plan = plan
        self.answerer = plan.answerer("cpu", dtype)
        self.model = self.answerer.loaded.model  # Lightning moves it to the device of the process
        self.attention_backend = attention_backend

    def predict_step(self, batch: list[Asked], batch_idx: int = 0) -> list[Entry]:
        """Answer the questions whose picture could be read."""
        collected = Collected()
        good = []
        for question, found in batch:
            item = Item(question.id, question.path)
            if isinstance(found, DataError):
                collected.fail(item, found)
            else:
                good.append((item, question, found))
        size = 1 if self.plan.generation.samples else max(len(good), 1)
        with use_backend(self.attention_backend):
            for start in range(0, len(good), size):
                items, questions, images = (list(part) for part in zip(*good[start : start + size], strict=True))
                answer_batch(collected, self.answerer, questions, items, images, self.plan.columns())
        return collected.entries


class Pictures(Dataset[Asked | None]):
    """Questions with their pictures; one ``None`` if there are no questions, so that no process is without a batch.

    Args:
        questions: Those of this process.
    """

    def __init__(self, questions: Sequence[Question]) -> None:
        self.questions: list[Question | None] = [*questions] or [None]

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Asked | None:
        """Read a picture, or say why it cannot be read."""
        question = self.questions[index]
        return None if question is None else (question, try_image(question.path))


def without_gaps(batch: list[Asked | None]) -> list[Asked]:
    """Return the questions of a batch."""
    return [entry for entry in batch if entry is not None]


class QuestionData(LightningDataModule):
    """The questions that an :class:`AnswerTable` still lacks, each in one process.

    Args:
        questions: All of them.
        table: Where the answers go; a callback of the trainer.
        batch_size: Questions answered at once in each process.
        num_workers: Processes that read pictures beside each process.
    """

    def __init__(
        self, questions: Sequence[Question], table: AnswerTable, *, batch_size: int = 8, num_workers: int = 0
    ) -> None:
        super().__init__()
        self.by_id = {question.id: question for question in questions}
        self.table = table
        self.batch_size = batch_size
        self.num_workers = num_workers

    def predict_dataloader(self) -> DataLoader[Asked | None]:
        """Return the batches of this process."""
        assert self.trainer is not None
        pictures = Pictures([self.by_id[item.id] for item in self.table.share(self.trainer)])
        # A distributed sampler of one process: Lightning would share the questions out a second time without it.
        sampler: DistributedSampler[Asked | None] = DistributedSampler(pictures, num_replicas=1, rank=0, shuffle=False)
        return DataLoader(
            pictures,
            batch_size=self.batch_size,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=without_gaps,
        )

    def transfer_batch_to_device(self, batch: list[Asked], device: torch.device, dataloader_idx: int) -> list[Asked]:
        """Leave pictures where they are; the processor moves what it makes of them."""
        return batch


class AnswerTable(Callback):
    """Writes the answers of any number of processes into one table, each once.

    The first process writes the journal of a :class:`saccade.batch.Run`; each other one appends its answers, as they
    come, to a part beside the table. The first takes the parts over at the end, and at the start those that an
    interrupted run has left. All must lie on a file system that the processes share.

    Args:
        out: Table, e.g. ``answers.jsonl``.
        questions: All questions, in every process the same.
        plan: What the answers depend on.
        dtype: Of the weights.
        options: Limit, shard, overwriting, progress. ``on_error`` must be ``"skip"``.

    Raises:
        ConfigError: If the table belongs to a run with other settings; nothing has been written then.
    """

    def __init__(
        self,
        out: str | Path,
        questions: Sequence[Question],
        plan: AnswerPlan,
        *,
        dtype: torch.dtype = torch.float32,
        options: BatchOptions | None = None,
    ) -> None:
        self.out = Path(out)
        self.options = options or BatchOptions()
        self.arguments: dict[str, Any] = {
            "items": items_of(questions),
            "out": out,
            "settings": plan.run_settings(dtype),
            "table": self.out,
            "title": plan.title("Lightning", dtype),
            "unit": "questions",
        }
        self.run = Run("vlm generate", options=self.options, **self.arguments)
        self.stack = ExitStack()
        self.stream: TextIO | None = None
        self.summary: RunSummary | None = None

    def parts(self) -> list[Path]:
        """Return the parts that are there."""
        return sorted(self.out.parent.glob(f"{self.run.files.data(self.out).name}.rank*.part"))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the journal, and take over what an interrupted run has left."""
        if trainer.is_global_zero:
            device = trainer.strategy.root_device
            self.run.title += f"  {trainer.world_size} x {device.type}"
            self.stack.enter_context(self.run)
            self.take_parts(use=not self.options.overwrite)

    def share(self, trainer: Trainer) -> list[Item]:
        """Return what this process has to do of what is not done yet."""
        if not trainer.is_global_zero:  # the first process has opened the journal by now
            self.run = Run("vlm generate", options=replace(self.options, overwrite=False), **self.arguments)
        return self.run.pending[trainer.global_rank :: trainer.world_size]

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait until every process knows its share, and open the part of this one."""
        trainer.strategy.barrier("shares are known")
        if not trainer.is_global_zero:
            part = self.out.with_name(f"{self.run.files.data(self.out).name}.rank{trainer.global_rank}.part")
            self.stream = self.stack.enter_context(part.open("a", encoding="utf-8"))

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401 - what predict_step returns
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Write the answers of a batch."""
        if trainer.is_global_zero:
            self.take(outputs)
            return
        assert self.stream is not None
        self.stream.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in outputs)
        self.stream.flush()

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the parts and write the table."""
        if not trainer.is_global_zero:
            self.stack.close()
        trainer.strategy.barrier("parts are complete")
        if trainer.is_global_zero:
            self.take_parts()
            self.stack.close()
            self.summary = self.run.summary

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the journal; what is in it and in the parts stays."""
        self.stack.__exit__(type(exception), exception, exception.__traceback__)

    def take_parts(self, *, use: bool = True) -> None:
        """Enter what other processes have written into the journal, unless it is of no use, and remove their parts."""
        for part in self.parts():
            if use:
                self.take(list(entries_of(part)))
            part.unlink()

    def take(self, entries: Sequence[Entry]) -> None:
        """Enter answers into the journal."""
        items = {item.id: item for item in self.run.items}
        for entry in entries:
            if entry["id"] not in items or entry["id"] in self.run.finished:
                continue
            item, seconds = items[entry["id"]], entry["seconds"]
            if "row" in entry:
                self.run.done(item, seconds=seconds, row=entry["row"])
            else:
                self.run.fail(item, DataError(entry["error"], reason=entry["reason"]), seconds=seconds)


def entries_of(part: Path) -> Iterator[Entry]:
    """Yield the entries of a part; a last line that a kill has cut off is dropped."""
    for line in part.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
        yield json.loads(line)


def predict_answers(
    questions: Sequence[Question],
    plan: AnswerPlan,
    *,
    out: str | Path,
    devices: int | str = "auto",
    num_nodes: int = 1,
    strategy: str = "auto",
    options: BatchOptions | None = None,
) -> RunSummary | None:
    """Answer questions on several devices or nodes, and write the rows of :func:`saccade.vlm.generate_answers`.

    A second call continues the first, also with another number of processes.

    Args:
        questions: Unique ids, the same in every process.
        plan: As in :func:`saccade.vlm.generate_answers`.
        out: As there.
        devices: Lightning's: how many in each node.
        num_nodes: Machines; each runs the same program, started by Slurm, torchrun or by hand as Lightning says.
        strategy: Lightning's, e.g. ``"ddp"``.
        options: Kind of device, batch size of each process, workers, resume, screen; the seed is the plan's.

    Returns:
        Counts in the first process, ``None`` in the others.

    Raises:
        ConfigError: If something is wrong that concerns all questions, or Lightning refuses the devices.
    """
    options = options or BatchOptions(batch_size=8)
    if options.device not in ACCELERATORS:
        raise ConfigError(
            f"With devices, device is a kind of device, one of {', '.join(ACCELERATORS)}; got {options.device!r}."
        )
    if options.on_error == "stop":
        raise ConfigError("on_error='stop' is for one process; several go on after a bad item.")
    dtype = resolve_precision(options.precision, resolve_device(options.device))
    table = AnswerTable(out, questions, plan, dtype=dtype, options=options)
    if options.dry_run:
        with table.run:
            return table.run.summary
    seed_everything(plan.seed, deterministic=options.deterministic)
    predictor = AnswerPredictor(plan, dtype=dtype, attention_backend=options.attention_backend)
    data = QuestionData(questions, table, batch_size=options.batch_size, num_workers=options.workers)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    try:
        trainer = Trainer(
            accelerator=ACCELERATORS[options.device],
            devices=devices,
            num_nodes=num_nodes,
            strategy=strategy,
            callbacks=[table],
            **quiet,  # type: ignore[arg-type]
        )
    except (MisconfigurationException, ValueError, ImportError) as error:
        raise ConfigError(f"The trainer cannot be built: {str(error).splitlines()[0]}") from error
    trainer.predict(predictor, data, return_predictions=False)
    return table.summary
