"""Golden runners of OAT. The official code counts objects first and puts the target token last; ours puts it first."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from saccade.checkpoints import load_weights
from saccade.gaze.decoding import greedy, sample
from saccade.gaze.oat import OAT
from saccade.gaze.oat_position import (
    TablePosition,
    distance_gram,
    distance_loss,
    sinusoid_grid,
    sinusoid_sequence,
)
from saccade.gaze.scenes import SceneBatch, grid_scene, stack_scenes
from saccade.gaze.training import path_loss
from tests.golden.case import Case
from tests.golden.runners import runner


def model_of(case: Case) -> OAT:
    """Build the model that a case describes and load its official weights."""
    config = case.config
    learned = config["pe"] == "learned"
    model = OAT(
        width=config["emb"],
        heads=config["nhead"],
        hidden=config["ffn"],
        encoder_layers=config["enc"],
        decoder_layers=config["dec"],
        readout_heads=config["CA_head"],
        readout_scale=config["CA_dk"],
        pyramid_levels=config["spp"],
        position="table" if learned else config["pe"],
        position_rows=config["pe_rows"],
        position_columns=config["pe_dim"],
        vocabulary=config["num_objects"] if config["CA_version"] == 0 else None,
    ).eval()
    state = case.group("state")
    if learned:
        state["position.table"] = case.tensors["input.pe_table"]
    else:
        torch.testing.assert_close(model.position.grid, case.tensors["input.pe_sinusoid3d"], rtol=0, atol=1e-6)
    load_weights(model, state, source=case.id)
    return model


def scenes_of(case: Case, crops: Tensor) -> SceneBatch:
    """Return the scenes of a case."""
    config = case.config
    grids = [
        grid_scene(config["rows"], config["cols"], target) for target in case.tensors["input.target_index"].tolist()
    ]
    bare = stack_scenes(grids)
    return SceneBatch(bare.position, bare.valid, bare.start, bare.target, features=crops.permute(0, 1, 4, 2, 3))


def target_last(tensor: Tensor, axis: int) -> Tensor:
    """Move the target token, or the class that ends a path, behind the objects."""
    return tensor.roll(-1, axis)


def keep_meaningful(got: Tensor, case: Case, name: str) -> Tensor:
    """Take rows whose input token is padding from the golden: they mean nothing, and ours have other tokens there."""
    lengths = torch.tensor(case.config["lengths"])
    padding = torch.arange(got.shape[1]) > lengths[:, None]
    return torch.where(padding[..., None], case.tensors[name], got)


def index_tensors(case: Case) -> dict[str, Tensor]:
    """Return the official numbering of tokens and their coordinates, written out for the comparison."""
    config = case.config
    rows, columns, count = config["rows"], config["cols"], config["num_objects"]
    paths, target = case.tensors["input.scanpath"], case.tensors["input.target_index"]
    batch, lengths = len(paths), torch.tensor(config["lengths"])
    source = torch.cat([torch.arange(count).expand(batch, -1), target[:, None]], 1)
    steps = torch.arange(paths.shape[1] + 2)
    tokens = F.pad(torch.where(paths < 0, config["pad_index"], paths), (1, 1), value=config["pad_index"])
    tokens[:, 0] = config["bos_index"]
    tokens = torch.where(steps == lengths[:, None] + 1, config["eos_index"], tokens)
    inputs = tokens[:, :-1]
    places = torch.stack([source // columns, source % columns, torch.zeros_like(source)], -1)
    places[:, -1, 2] = 1
    visited = torch.stack([inputs // columns, inputs % columns, (inputs == target[:, None]).long()], -1)
    middle = torch.tensor([rows / 2, columns / 2, 0])
    visited = torch.where((inputs == config["bos_index"])[..., None], middle, visited)
    return {
        "output.src_pos": source,
        "output.tgt_tokens": tokens,
        "output.src_coords": places,
        "output.tgt_coords": visited,
    }


@runner("gaze.oat_model")
def oat_model(case: Case) -> None:
    """Embeddings, encoder, decoder, logits, loss, gradients, greedy and sampled paths."""
    model, config = model_of(case), case.config
    crops = case.tensors["input.object_crops"].requires_grad_()
    scenes, paths = scenes_of(case, crops), case.tensors["input.scanpath"][:, None].long()
    looks = model.look(scenes)
    encoded = model.encode(scenes)
    states = model.decode(encoded, model.tokens_of(paths))
    inputs = model.inputs(encoded, model.tokens_of(paths), 0, None)[:, 0]
    official = official_logits(model, encoded_logits := model.class_logits(encoded, states), states)[:, 0]
    loss = path_loss(encoded_logits, paths, pad_logit=model.pad_logit(states))
    got = {
        "output.src_emb": target_last(model.source_tokens(scenes, looks), 1),
        "output.tgt_emb": keep_meaningful(inputs, case, "output.tgt_emb"),
        "output.memory": target_last(encoded.memory, 1),
        "output.decoder_out": keep_meaningful(states[:, 0], case, "output.decoder_out"),
        "output.logits": keep_meaningful(official, case, "output.logits"),
        "output.loss": loss[None],
        "output.sim_per_trial": similarity(official, paths[:, 0], config["lengths"]),
    }
    case.compare({name: like(tensor, case, name) for name, tensor in (index_tensors(case)).items()} | got)
    case.compare(gradients(case, model, loss, crops))
    with torch.inference_mode():
        decoded(case, model, scenes)


def official_logits(model: OAT, logits: Tensor, states: Tensor) -> Tensor:
    """Return logits in the official order: objects, end, padding."""
    return torch.cat([target_last(logits, -1), model.pad_logit(states)], -1)


def similarity(logits: Tensor, paths: Tensor, lengths: list[int]) -> Tensor:
    """Return the mean probability of the next human object, per trial."""
    probability = logits.softmax(-1)
    rows = zip(probability, paths, lengths, strict=True)
    return torch.stack([p[:length].gather(1, path[:length, None]).mean() for p, path, length in rows])


def gradients(case: Case, model: OAT, loss: Tensor, crops: Tensor) -> dict[str, Tensor]:
    """Return the gradients that are stored."""
    tensors = {f"grad.model.{name}": parameter for name, parameter in model.named_parameters()}
    tensors["grad.object_crops"] = crops
    names = [name for name in case.expected() if name.startswith("grad.")]
    return dict(zip(names, torch.autograd.grad(loss, [tensors[name] for name in names]), strict=True))


def decoded(case: Case, model: OAT, scenes: SceneBatch) -> None:
    """Compare greedy paths, the logits of their steps, and paths sampled from given uniform numbers."""
    length = case.config["max_len"]
    best = greedy(model, scenes, max_length=length)
    drawn = sample(model, scenes, 1, max_length=length, uniforms=case.tensors["input.uniforms"][:, None])
    encoded = model.encode(scenes)
    states = model.decode(encoded, model.tokens_of(best.objects))
    steps = official_logits(model, model.class_logits(encoded, states), states)[:, 0, :length]
    running = torch.arange(steps.shape[1]) <= best.lengths
    steps = F.pad(torch.where(running[..., None], steps, -9999.0), (0, 0, 0, length - steps.shape[1]), value=-9999.0)
    got: dict[str, Any] = {"output.greedy": best.objects[:, 0], "output.sampled": drawn.objects[:, 0]}
    got = {name: F.pad(paths, (0, length - paths.shape[1]), value=-1) for name, paths in got.items()}
    case.compare(
        {name: like(tensor, case, name) for name, tensor in got.items()} | {"output.greedy_step_logits": steps}
    )
    assert best.lengths[:, 0].tolist() == case.config["greedy_lengths"]
    assert drawn.lengths[:, 0].tolist() == case.config["sampled_lengths"]


def like(tensor: Tensor, case: Case, name: str) -> Tensor:
    """Return integers in the stored dtype."""
    return tensor.to(case.tensors[name].dtype)


@runner("gaze.oat_position_encoding")
def position_encoding(case: Case) -> None:
    """The table's objective and its course under Adam, look-ups, sinusoids."""
    sigma, width = case.config["sigma"], case.config["sin_emb"]
    table = case.tensors["input.W0"].clone().requires_grad_()
    optimizer = torch.optim.Adam([table], lr=0.01)
    got = {
        "output.loss0": distance_loss(table, sigma).detach()[None],
        "output.gram_target": distance_gram(len(table), sigma),
    }
    wanted = {int(name.rpartition("_")[2]) for name in case.tensors if name.startswith("output.W_after_")}
    losses = {int(name.rpartition("_")[2]) for name in case.tensors if name.startswith("output.loss_at_iter_")}
    last = int(next(name for name in case.tensors if "gram_after" in name).rpartition("_")[2])
    for step in range(1, last + 1):
        optimizer.zero_grad()
        loss = distance_loss(table, sigma)
        loss.backward()
        optimizer.step()
        if step in wanted:
            got[f"output.W_after_{step}"] = table.detach().clone()
        if step in losses:
            got[f"output.loss_at_iter_{step}"] = loss.detach()[None]
    got[f"output.gram_after_{last}"] = F.cosine_similarity(table[:, None], table, dim=-1).detach()
    look_up = TablePosition(case.tensors["input.table"], case.config["lookup_emb"])
    got["output.lookup"] = look_up(case.tensors["input.coords"])
    got["output.sin1d"] = sinusoid_sequence(len(case.tensors["output.sin1d"]), width)
    for kind in ("original", "exp1", "exp2", "linear"):
        got[f"output.sin3d_{kind}"] = sinusoid_grid(kind, width)
    case.compare(got)
