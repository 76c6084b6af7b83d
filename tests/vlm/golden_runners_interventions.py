"""Golden runners of the interventions: their algebra on tensors, and whole models under ``intervene``."""

import math

import torch
from torch import Tensor

from saccade.attention import attention, attention_statistics, partitioned_attention
from saccade.vlm import ACT, GIFT, VAR, VHR, intervene
from saccade.vlm.contrastive import contrast_logits
from saccade.vlm.edits import recombine, scaled
from saccade.vlm.interventions.act import act_gain, excess_tokens
from saccade.vlm.interventions.gift import gift_gain, question_scale, top_heads
from saccade.vlm.interventions.gift_saliency import normalised_saliency, rising_attention
from saccade.vlm.interventions.pai import pai_factor
from saccade.vlm.interventions.vaf import vaf_factor
from saccade.vlm.interventions.var import image_centric, sink_score, sink_share, var_gain
from saccade.vlm.interventions.vhr import vision_heads
from saccade.vlm.stack_calls import cache_argument
from tests.golden.case import Case
from tests.golden.runners import runner


def part(case: Case, prefix: str) -> dict[str, Tensor]:
    """Return the input tensors of one numbered problem."""
    return case.group(f"{prefix}.input")


def identity(keys: int) -> Tensor:
    """Return values that turn attention into its weights, ``(1, 1, keys, keys)``."""
    return torch.eye(keys)[None, None]


def one_head(value: Tensor) -> Tensor:
    """Return a tensor of 0 and 1 without its batch axis, as the goldens store it."""
    return value[0].float()


@runner("vlm.op_var")
def op_var(case: Case) -> None:
    for name, config in case.config["cases"].items():
        tensors = part(case, name)
        start, length = config["image_start"], config["image_len"]
        hidden = tensors["hidden_states"]
        score = sink_score(hidden, tuple(config["sink_dims"]))
        sinks = score > config["tau"]
        image = torch.zeros_like(sinks)
        image[:, start : start + length] = True
        labels = torch.where(image, 2, 3) - 2 * sinks.long()
        num_visual, has_sink = image.sum(1), bool((sinks & image).any())

        def edit(query: Tensor, key: Tensor, value: Tensor, labels: Tensor = labels, config: dict = config,
                 num_visual: Tensor = num_visual, has_sink: bool = has_sink) -> tuple[Tensor, ...]:  # fmt: skip
            """Return output, weights, masses and selection of all rows."""
            columns = torch.nn.functional.pad(labels, (0, key.shape[2] - labels.shape[1]), value=3)
            both = torch.cat([value, identity(key.shape[2]).expand(*value.shape[:2], -1, -1)], -1)
            parts = partitioned_attention(query, key, both, columns, 4, causal=True)
            selected = image_centric(parts.class_mass, num_visual, config["rho"], config["summ"]) & has_sink
            return parts, selected

        query, key, value = tensors["query"], tensors["key"], tensors["value"]
        width = value.shape[-1]
        parts, selected = edit(query, key, value)
        rows = torch.arange(query.shape[2]) >= start + length
        gain = var_gain(parts.class_mass, selected & rows, 1 - config["p"])
        out = recombine(parts.class_out, parts.class_mass, gain, normalise=False)
        got = {
            "phi": score,
            "sink_mask": one_head(sinks),
            "portion": sink_share(parts.class_mass, num_visual),
            "vis_mass": parts.class_mass[:, :, 0] + parts.class_mass[:, :, 2],
            "selected": selected.float(),
            "attn_output_plain": parts.out[..., :width],
            "weights_before": parts.out[..., width:],
            "attn_output": out[..., :width],
            "weights_after": out[..., width:],
        }
        step = 0
        while f"decode{step}.query" in tensors:
            key = torch.cat([key, tensors[f"decode{step}.key_new"]], 2)
            value = torch.cat([value, tensors[f"decode{step}.value_new"]], 2)
            parts, selected = edit(tensors[f"decode{step}.query"], key, value)
            gain = var_gain(parts.class_mass, selected, 1 - config["p"])
            out = recombine(parts.class_out, parts.class_mass, gain, normalise=False)
            got |= {
                f"decode{step}.selected": selected.float(),
                f"decode{step}.weights_before": parts.out[..., width:],
                f"decode{step}.weights_after": out[..., width:],
                f"decode{step}.attn_output": out[..., :width],
            }
            step += 1
        case.compare({f"{name}.output.{key}": tensor for key, tensor in got.items()})


@runner("vlm.op_gift")
def op_gift(case: Case) -> None:
    for name, config in case.config["cases"].items():
        tensors = part(case, name)
        start, length = config["image_start"], config["image_len"]
        content = [config["query_start"] + offset for offset in config["content_offsets_from_query_start"]]
        got: dict[str, Tensor] = {}
        maps = []
        layer = 0
        rows = sorted({row for place in content for row in (place - 1, place)})
        pairs = [(rows.index(place - 1), rows.index(place)) for place in content]
        chosen = torch.ones(1, len(pairs), dtype=torch.bool)
        while f"saliency_layer{layer}.query" in tensors:
            query, key = tensors[f"saliency_layer{layer}.query"], tensors[f"saliency_layer{layer}.key"]
            weights = attention(query, key, identity(key.shape[2]).expand(1, key.shape[1], -1, -1), causal=True)
            got[f"saliency_layer{layer}.weights"] = weights
            maps.append(rising_attention(weights[:, :, rows, start : start + length], pairs, chosen))
            layer += 1
        mean = torch.stack(maps).mean(0)
        saliency = normalised_saliency(mean, torch.ones_like(mean, dtype=torch.bool))
        got["saliency_normalised"] = saliency[0]
        got["saliency_map"] = torch.exp(config["alpha"] * saliency)[0]

        prompt = config["n_prompt"]
        labels = torch.full((1, prompt), 2)
        labels[:, config["query_start"] : config["query_end"] + 1] = 1
        labels[:, start : start + length] = 0
        log_weight = torch.zeros(1, prompt)
        log_weight[:, start : start + length] = config["alpha"] * saliency

        def last_row(query: Tensor, key: Tensor, value: Tensor, labels: Tensor = labels,
                     log_weight: Tensor = log_weight) -> tuple[Tensor, ...]:  # fmt: skip
            """Return output and weights of one row, plain weights, head sets and r."""
            more = key.shape[2] - labels.shape[1]
            labels = torch.nn.functional.pad(labels, (0, more), value=2)
            log_weight = torch.nn.functional.pad(log_weight, (0, more))
            both = torch.cat([value, identity(key.shape[2]).expand(*value.shape[:2], -1, -1)], -1)
            parts = partitioned_attention(
                query, key, both, labels, 3, key_log_weight=log_weight, weighted_class=0, causal=True
            )
            mass = torch.cat([parts.class_mass, parts.weighted_mass.unsqueeze(2)], 2)
            out = torch.cat([parts.class_out, parts.weighted_out.unsqueeze(2)], 2)
            vision, question = top_heads(mass[:, :, 0]), top_heads(mass[:, :, 1])
            scale = question_scale(mass, vision)
            edited = recombine(out, mass, gift_gain(vision, question, scale), normalise=True)
            width = value.shape[-1]
            return edited[..., :width], edited[..., width:], parts.out[..., width:], vision, question, scale

        query, key, value = tensors["query"], tensors["key"], tensors["value"]
        plain = attention(query, key, value, causal=True)
        out, weights, before, *_ = last_row(query[:, :, -1:], key, value)
        got["prefill.attn_output_plain"] = plain
        got["prefill.attn_output"] = torch.cat([plain[:, :, :-1], out], 2)
        got["prefill.last_row_weights"], got["prefill.last_row_weights_plain"] = weights[:, :, 0], before[:, :, 0]
        step = 0
        while f"decode{step}.query" in tensors:
            key = torch.cat([key, tensors[f"decode{step}.key_new"]], 2)
            value = torch.cat([value, tensors[f"decode{step}.value_new"]], 2)
            out, weights, before, vision, question, scale = last_row(tensors[f"decode{step}.query"], key, value)
            got |= {
                f"decode{step}.attn_output": out,
                f"decode{step}.weights_after": weights,
                f"decode{step}.weights_plain": before,
                f"decode{step}.vision_heads": vision[0, :, 0].float(),
                f"decode{step}.query_heads": question[0, :, 0].float(),
                f"decode{step}.query_scale": scale[0, :, 0],
            }
            step += 1
        case.compare({f"{name}.output.{key}": tensor for key, tensor in got.items()})


@runner("vlm.op_act")
def op_act(case: Case) -> None:
    for name, config in case.config["cases"].items():
        tensors = part(case, name)
        query, key, value = tensors["query"], tensors["key"], tensors["value"]
        mean = attention_statistics(query, key, causal=True).importance
        heads = torch.zeros(query.shape[1], dtype=torch.bool)
        heads[config["heads"]] = True
        excess = excess_tokens(mean, config["threshold"]) & heads[:, None]
        width = value.shape[-1]
        both = torch.cat([value, identity(key.shape[2]).expand(*value.shape[:2], -1, -1)], -1)
        parts = partitioned_attention(query, key, both, excess.long(), 2, causal=True)
        out = recombine(parts.class_out, parts.class_mass, act_gain(parts.class_mass, config["beta"]), normalise=False)
        got = {
            "column_mean": mean[0],
            "sink_mask": excess[0].float(),
            "attn_output_plain": parts.out[..., :width],
            "weights_before": parts.out[..., width:],
            "attn_output": out[..., :width],
            "weights_after": out[..., width:],
        }
        case.compare({f"{name}.output.{key}": tensor for key, tensor in got.items()})


@runner("vlm.op_vhr")
def op_vhr(case: Case) -> None:
    for name, config in case.config["cases"].items():
        tensors = part(case, name)
        found = vision_heads(
            tensors["head_output_image_last"][None],
            tensors["head_output_text_only_last"][None],
            squared_distance=True,
            outlier_filter=True,
            min_std=1.0 if config["std_guard"] else 0.0,
        )
        scale = torch.where(found.selected, config["alpha"], 1.0)
        got = {
            "vhd_squared": found.divergence[0],
            "text_activation_squared": found.text_activation[0],
            "outlier": one_head(found.outlier),
            "vhd_filtered": found.filtered[0],
            "selected": one_head(found.selected),
            "reinforced": tensors["attn_output"] * scale[:, :, None, None],
        }
        case.compare({f"{name}.output.{key}": tensor for key, tensor in got.items()})


@runner("vlm.op_peers")
def op_peers(case: Case) -> None:
    for name, config in case.config["cases"].items():
        tensors = part(case, name)
        query, key, value = tensors["query"], tensors["key"], tensors["value"]
        queries, keys = query.shape[2], key.shape[2]
        start, stop = config["image_start"], config["image_start"] + config["image_len"]
        image = torch.zeros(1, keys, dtype=torch.bool)
        image[:, start:stop] = True
        both = torch.cat([value, identity(keys).expand(*value.shape[:2], -1, -1)], -1)

        plain = attention(query, key, both, causal=True)
        last = query[:, :, -1:]
        paid = scaled(key, pai_factor(last, key, image.float(), config["pai_alpha"]))
        values = both.repeat_interleave(query.shape[1] // both.shape[1], 1)
        pai = torch.cat([plain[:, :, :-1], attention(last, paid, values)], 2)
        amplified = scaled(key, vaf_factor(image, config["vaf_enh"], config["vaf_sup"])[:, None])
        # The golden sliced the rows with `stop - (keys - queries)`, which is negative where the first query lies behind
        # the image, and so left out all but the last rows; VAF itself changes every row behind the image.
        behind = torch.zeros(queries, dtype=torch.bool)
        behind[stop - (keys - queries) if queries > 1 else 0 :] = True
        vaf = torch.where(behind[:, None], attention(query, amplified, both, causal=True), plain)
        width = value.shape[-1]
        logits, contrast = tensors["logits"], tensors["logits_contrast"]
        got = {
            "pai.attn_output": pai[..., :width],
            "pai.weights": pai[..., width:],
            "vaf.attn_output": vaf[..., :width],
            "vaf.weights": vaf[..., width:],
            "vcd.logits": contrast_logits(
                logits, contrast, alpha=config["vcd_alpha"], cutoff=math.log(config["vcd_beta"])
            ),
            "pai_cfg.logits": contrast_logits(
                logits.log_softmax(-1),
                contrast.log_softmax(-1),
                alpha=config["pai_gamma"] - 1,
                cutoff=math.log(config["pai_cutoff"]),
            ),
        }
        case.compare({f"{name}.output.{key}": tensor for key, tensor in got.items()})


def steps(model, inputs: dict[str, Tensor], forced: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits of the prompt, and those after each forced token but the last, feeding them one by one."""
    from transformers import DynamicCache

    cache = {cache_argument(model): DynamicCache(config=model.config)}
    prefill = model(**inputs, **cache).logits
    decoded = []
    mask = inputs.get("attention_mask")
    for step in range(forced.shape[1] - 1):
        more = {}
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            more["attention_mask"] = mask
        decoded.append(model(input_ids=forced[:, step : step + 1], **cache, **more).logits[:, -1])
    return prefill, torch.stack(decoded, 1)


def greedy(model, inputs: dict[str, Tensor], count: int) -> Tensor:
    """Return greedy tokens with the end of text ignored."""
    ids = model.generate(**inputs, max_new_tokens=count, do_sample=False, eos_token_id=None, pad_token_id=0)
    return ids[:, inputs["input_ids"].shape[1] :]


def positions_mask(length: int, positions: list[int]) -> Tensor:
    """Return bool ``(1, length)``, ``True`` at some positions."""
    mask = torch.zeros(1, length, dtype=torch.bool)
    mask[:, positions] = True
    return mask


def run_model(case: Case, model, inputs: dict[str, Tensor], methods: dict) -> None:
    """Compare a model, plain and under each method, with what the official code gave."""
    where = case.config["parameters"]["positions"]
    length = inputs["input_ids"].shape[1]
    query_mask = positions_mask(length, list(range(where["query_start"], where["query_end"] + 1)))
    forced = case.tensors["input.forced_tokens"]
    image = slice(where["image_start"], where["image_start"] + where["image_len"])
    for name, method in {"plain": None, **methods}.items():
        wanted = {
            key.removeprefix(f"output.{name}."): t
            for key, t in case.tensors.items()
            if key.startswith(f"output.{name}.")
        }
        got: dict[str, Tensor] = {}
        if method is None:
            prefill, decoded = steps(model, inputs, forced)
            tokens = greedy(model, inputs, forced.shape[1])
        else:
            with intervene(model, method, query_mask=query_mask) as ctx:
                if "decode_logits" in wanted:
                    prefill, decoded = steps(model, inputs, forced)
                    tokens = greedy(model, inputs, forced.shape[1])
                else:
                    prefill = model(**inputs).logits
                    decoded = tokens = None
            if "saliency_map" in wanted:
                (saliency,) = ctx.stats["gift"]["saliency"].values()
                got["saliency_map"] = torch.exp(method.alpha * saliency)[0, image]
            for layer, heads in ctx.stats.get("vhr", {}).get("heads", {}).items():
                got[f"layer{layer}.selected"] = heads[0].float()
                got[f"layer{layer}.vhd_squared"] = ctx.stats["vhr"]["divergence"][layer][0]
                got[f"layer{layer}.text_head_output"] = ctx.stats["vhr"]["text_only"][layer][0]
        if "prefill_logits" in wanted:
            got["prefill_logits"] = prefill
        if "last_prompt_logits" in wanted:
            got["last_prompt_logits"] = prefill[:, -1]
        if decoded is not None:
            got["decode_logits"], got["greedy_tokens"] = decoded, tokens.to(wanted["greedy_tokens"].dtype)
        case.compare({f"output.{name}.{key}": tensor for key, tensor in got.items()})


def gift_of(config: dict, where: dict, length: int) -> GIFT:
    """Return GIFT with the content tokens of a case."""
    content = [where["query_start"] + offset for offset in config["content_offsets_from_query_start"]]
    return GIFT(
        saliency_layers=tuple(config["saliency_layers"]),
        enhancement_layers=tuple(config["enhancement_layers"]),
        alpha=config["alpha"],
        content_tokens=positions_mask(length, content),
    )


def var_of(config: dict) -> VAR:
    """Return VAR in our words."""
    return VAR(
        sink_channels=tuple(config["sink_dims"]),
        tau=config["tau"],
        move_fraction=1 - config["p_kept"],
        min_nonsink_share=1 - config["rho"],
        min_visual_mass=config["summ"],
        last_layer=config["layers"].endswith("L-1"),
    )


def vhr_of(config: dict) -> VHR:
    """Return VHR in our words."""
    return VHR(
        alpha=config["alpha"],
        layers=tuple(config["layers"]),
        outlier_filter=config["outlier_filter"],
        squared_distance=True,
        min_std=1.0 if config["std_guard"] else 0.0,
    )


def act_of(config: dict) -> ACT:
    """Return ACT in our words."""
    heads = {int(layer): tuple(own) for layer, own in config["heads"].items()}
    return ACT(heads=heads, beta=config["beta"], threshold=config["threshold"])


def methods_of(parameters: dict, length: int) -> dict:
    """Return the methods that a case names, each by the beginning of its name."""
    make = {
        "var": var_of,
        "gift": lambda config: gift_of(config, parameters["positions"], length),
        "vhr": vhr_of,
        "act": act_of,
    }
    kinds = {name: next((kind for kind in make if name.split("_")[0] == kind), None) for name in parameters}
    return {name: make[kind](parameters[name]) for name, kind in kinds.items() if kind is not None}


@runner("vlm.model_llava_tiny")
def model_llava_tiny(case: Case) -> None:
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    parameters = case.config["parameters"]
    config = parameters["config"]
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(**config["vision"]),
            text_config=LlamaConfig(**config["text"]),
            **config["llava"],
        )
    ).eval()
    model.load_state_dict(case.group("state"))
    inputs = {name: t for name, t in case.group("input").items() if name != "forced_tokens"}
    methods = methods_of(parameters, inputs["input_ids"].shape[1])
    run_model(case, model, inputs, methods)


@runner("vlm.model_qwen2vl_tiny")
def model_qwen2vl_tiny(case: Case) -> None:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    parameters = case.config["parameters"]
    config = parameters["config"]
    model = Qwen2VLForConditionalGeneration(
        Qwen2VLConfig(text_config=config["text"], vision_config=config["vision"], **config["top"])
    ).eval()
    model.load_state_dict(case.group("state"))
    inputs = {name: t for name, t in case.group("input").items() if name != "forced_tokens"}
    inputs["mm_token_type_ids"] = (inputs["input_ids"] == config["top"]["image_token_id"]).long()
    run_model(case, model, inputs, methods_of(parameters, inputs["input_ids"].shape[1]))
