"""OAT: a scanpath as a sequence of objects, each chosen by attention over the objects of the scene.

An encoder reads the target and all objects, a decoder the objects visited so far, and the next one is that whose
encoding fits the decoder's state best. The path ends when that is the target token. Any number of objects anywhere:
positions are continuous, scenes are padded and masked.

Source: "OAT: Object-Level Attention Transformer for Gaze Scanpath Prediction", ECCV 2024 (arXiv:2407.13335), and its
code, HKUST-NISL/oat_eccv24.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from saccade.errors import CheckpointError, ConfigError, ShapeError
from saccade.gaze.oat_features import ConstantEmbedding, CropEmbedding, FeatureEmbedding
from saccade.gaze.oat_layers import Decoder, Encoder, KeyCache
from saccade.gaze.oat_position import (
    NOWHERE,
    DistancePosition,
    PositionEncoding,
    build_position,
    check_inside,
    sinusoid_sequence,
)
from saccade.gaze.scenes import SceneBatch

__all__ = ["OAT", "EncodedScenes", "OATPaths", "checkpoint_filter_fn"]

END, BEGIN = 0, 0  # class that ends a path, token that begins one; object i is class and token i + 1


class Looks(NamedTuple):
    """What is seen of objects ``(B, N, E/2)``, of the target ``(B, 1, E/2)``, and at the begin of a path ``(E/2,)``."""

    objects: Tensor
    target: Tensor
    begin: Tensor


@dataclass(frozen=True)
class EncodedScenes:
    """What the decoder needs to know about B scenes, computed once however many paths there are.

    Args:
        tokens: Decoder inputs by token: begin, then each object, ``(B, 1 + N, E)``.
        memory: Encoder outputs: target token, then each object, ``(B, 1 + N, E)``.
        valid: Bool ``(B, 1 + N)``: target and objects that exist.
        keys: Key and value of ``memory`` for each decoder layer, ``(B, H, 1 + N, D)``.
        readout: Object attention folded into one row per class, ``(B, 1 + N, E)``, and its constants ``(B, 1 + N)``;
            ``None`` for a fixed vocabulary.
    """

    tokens: Tensor
    memory: Tensor
    valid: Tensor
    keys: list[tuple[Tensor, Tensor]]
    readout: tuple[Tensor, Tensor] | None

    @property
    def mask(self) -> Tensor:
        """``valid`` in the shape that attention takes."""
        return self.valid[:, None, None]


class ObjectAttention(nn.Module):
    """One head of the bilinear readout.

    Args:
        width: Numbers per token.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.decode_fc = nn.Linear(width, width)
        self.encode_fc = nn.Linear(width, width)

    def fold(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return rows and constants with ``decode_fc(D) . encode_fc(M) = rows . D + constants``."""
        encoded = self.encode_fc(memory)
        return encoded @ self.decode_fc.weight, encoded @ self.decode_fc.bias


class OAT(nn.Module):
    """The object-level attention transformer.

    Classes and tokens are numbered from the fixed end: 0 ends (or begins) a path, ``i + 1`` is object i. Padding
    objects get the logit minus infinity.

    Args:
        width: Numbers per token E, even; half for what is seen, half for where it is.
        heads: Attention heads.
        hidden: Width of the feed-forward networks.
        encoder_layers: Number of them.
        decoder_layers: Number of them.
        readout_heads: Heads Nc of the object attention.
        readout_scale: ``dk``: the readout is divided by its square root; ``None`` means E. The official code has 512 at
            every width.
        seen: ``"crops"`` (a small network trained from scratch, as published), ``"features"`` (given by an encoder) or
            ``"nothing"``.
        feature_dim: Numbers per object for ``"features"``.
        pyramid_levels: Spatial pyramid of the crop network; see ``CropEmbedding``.
        position: ``"distance"`` (closed form), ``"table"`` (a stored table, as in official checkpoints), or a sinusoid
            of the official ablations on a layout of 3 x 11: ``"original"``, ``"exp1"``, ``"exp2"``, ``"linear"``.
        position_rows: Cells along the longer side of the largest scene.
        position_columns: Numbers per code of a ``"table"``; ``None`` means a third of half the width, rounded up.
        position_sigma: Width of the Gaussian of ``"distance"``, in cells.
        target_position: ``"known"``: the target token carries the target's place, as published, so that the model
            predicts how one gets to a place that it knows. ``"hidden"``: it carries the flag alone.
        vocabulary: Number of objects of a fixed ``Linear`` in place of object attention (official ``CA_version`` 0);
            ``None`` means object attention.
        num_viewers: Viewers with an embedding of their own, added to the decoder's input; 0: paths of anybody.
        dropout: Of attention weights, hidden units, branches and the decoder's input.

    Raises:
        ConfigError: If the options do not fit each other.
    """

    def __init__(
        self,
        width: int = 512,
        heads: int = 4,
        hidden: int = 512,
        encoder_layers: int = 4,
        decoder_layers: int = 4,
        readout_heads: int = 2,
        readout_scale: float | None = None,
        seen: Literal["crops", "features", "nothing"] = "crops",
        feature_dim: int | None = None,
        pyramid_levels: int = 0,
        position: PositionEncoding = "distance",
        position_rows: int = 14,
        position_columns: int | None = None,
        position_sigma: float = 2.0,
        target_position: Literal["known", "hidden"] = "known",
        vocabulary: int | None = None,
        num_viewers: int = 0,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        if width % 2 or width % heads:
            raise ConfigError(f"width must be even and a multiple of heads = {heads}, got {width}.")
        if (feature_dim is None) == (seen == "features"):
            raise ConfigError("feature_dim belongs to seen='features': give both or neither.")
        half = width // 2
        self.width, self.heads = width, heads
        self.readout_scale = width if readout_scale is None else readout_scale
        self.position_rows, self.target_position, self.num_viewers = position_rows, target_position, num_viewers
        self.vocabulary = vocabulary
        columns = -(-half // 3) if position_columns is None else position_columns
        self.position = build_position(position, half, position_rows, columns, position_sigma)
        self.cnn_embedding: nn.Module  # the official name, whatever the objects are seen by
        if seen == "crops":
            self.cnn_embedding = CropEmbedding(half, pyramid_levels)
        elif feature_dim is not None:
            self.cnn_embedding = FeatureEmbedding(feature_dim, half)
        else:
            self.cnn_embedding = ConstantEmbedding(half)
        self.transformer_encoder = Encoder(encoder_layers, (width, heads, hidden, dropout))
        self.transformer_decoder = Decoder(decoder_layers, (width, heads, hidden, dropout))
        self.cross_attentions = nn.ModuleList()
        self.readout: nn.Linear | None = None
        self.generator: nn.Linear | None = None
        if vocabulary is None:
            self.cross_attentions.extend(ObjectAttention(width) for _ in range(readout_heads))
            if readout_heads > 1:
                self.readout = nn.Linear(readout_heads, 1)
        else:
            self.generator = nn.Linear(width, vocabulary + 2)
        self.viewers = nn.Embedding(num_viewers, width) if num_viewers else None
        self.dropout = nn.Dropout(dropout)
        for parameter in self.parameters():
            if parameter.ndim > 1:
                nn.init.xavier_uniform_(parameter)
        if self.viewers is not None:
            nn.init.zeros_(self.viewers.weight)

    def encode(self, scenes: SceneBatch) -> EncodedScenes:
        """Encode scenes, and prepare what every step of every path reads.

        Raises:
            ShapeError: If the features are of another kind than the model's, or an object stands outside its positions.
        """
        if isinstance(self.position, DistancePosition):
            check_inside(scenes.position, self.position_rows)
        if self.vocabulary is not None and self.vocabulary != scenes.num_objects:
            raise ShapeError(
                f"The model has a fixed vocabulary of {self.vocabulary}, got {scenes.num_objects} objects."
            )
        looks = self.look(scenes)
        valid = torch.cat([torch.ones_like(scenes.valid[:, :1]), scenes.valid], 1)
        memory = self.transformer_encoder(self.source_tokens(scenes, looks), valid[:, None, None])
        keys = self.transformer_decoder.keys(memory)
        return EncodedScenes(self.path_tokens(scenes, looks), memory, valid, keys, self.fold_readout(memory))

    def look(self, scenes: SceneBatch) -> Looks:
        """Embed what is seen of each object, once."""
        objects, begin = self.cnn_embedding(scenes)
        is_target = scenes.is_target()
        if scenes.target_features is not None and isinstance(self.cnn_embedding, FeatureEmbedding):
            target: Tensor = self.cnn_embedding.embed(scenes.target_features)[:, None]
        else:
            target = (objects * is_target[..., None]).sum(1, keepdim=True)
            target = torch.where(is_target.any(1)[:, None, None], target, begin)
        return Looks(objects, target, begin)

    def source_tokens(self, scenes: SceneBatch, looks: Looks) -> Tensor:
        """Return the encoder's input: target token, then objects, ``(B, 1 + N, E)``."""
        is_target = scenes.is_target()
        nowhere = torch.full_like(scenes.position[:, :1], NOWHERE)
        if self.target_position == "known":
            place = (scenes.position * is_target[..., None]).sum(1, keepdim=True)
            place = torch.where(is_target.any(1)[:, None, None], place, nowhere)
        else:
            place = nowhere
        flagged = torch.cat([place, torch.ones_like(place[..., :1])], -1)
        places = torch.cat([scenes.position, torch.zeros_like(scenes.position[..., :1])], -1)
        seen = torch.cat([looks.target, looks.objects], 1)
        return torch.cat([seen, self.position(torch.cat([flagged, places], 1))], -1)

    def path_tokens(self, scenes: SceneBatch, looks: Looks) -> Tensor:
        """Return the decoder's inputs by token: begin, then each object with its flag, ``(B, 1 + N, E)``."""
        start = torch.cat([scenes.start, torch.zeros_like(scenes.start[:, :1])], -1)[:, None]
        places = torch.cat([scenes.position, scenes.is_target()[..., None].to(scenes.position)], -1)
        seen = torch.cat([looks.begin.expand(len(scenes), 1, -1), looks.objects], 1)
        return torch.cat([seen, self.position(torch.cat([start, places], 1))], -1)

    def fold_readout(self, memory: Tensor) -> tuple[Tensor, Tensor] | None:
        """Sum the heads of the object attention: it is linear, so one matrix per scene is all of it."""
        if not self.cross_attentions:
            return None
        parts = [cast(ObjectAttention, head).fold(memory) for head in self.cross_attentions]
        rows, constants = (torch.stack(part, -1) / self.readout_scale**0.5 for part in zip(*parts, strict=True))
        if self.readout is None:
            return rows[..., 0], constants[..., 0]
        return rows @ self.readout.weight[0], self.readout(constants)[..., 0]

    def inputs(self, encoded: EncodedScenes, tokens: Tensor, start: int, viewers: Tensor | None) -> Tensor:
        """Embed tokens ``(B, K, T)``, the first of which is number ``start`` of its path, as ``(B, K, T, E)``."""
        batch, paths, length = tokens.shape
        index = tokens.flatten(1)[..., None].expand(-1, -1, self.width)
        embedded = encoded.tokens.gather(1, index).view(batch, paths, length, -1)
        embedded = embedded + sinusoid_sequence(start + length, self.width)[start:].to(embedded)
        if self.viewers is not None:
            embedded = embedded + self.viewer_offsets(viewers, batch, paths)[:, :, None]
        offset: Tensor = self.dropout(embedded)
        return offset

    def viewer_offsets(self, viewers: Tensor | None, batch: int, paths: int) -> Tensor:
        """Return the embedding of each path's viewer, ``(B, K, E)``; of an unknown one (-1), the mean of all."""
        if self.viewers is None:
            raise ShapeError("This model has no viewers.")
        weight = torch.cat([self.viewers.weight.mean(0, keepdim=True), self.viewers.weight])
        if viewers is None:
            return weight[0].expand(batch, paths, -1)
        return weight[viewers + 1]

    def decode(
        self,
        encoded: EncodedScenes,
        tokens: Tensor,
        *,
        viewers: Tensor | None = None,
        caches: list[KeyCache] | None = None,
        start: int = 0,
    ) -> Tensor:
        """Run the decoder on tokens ``(B, K, T)`` and return its states ``(B, K, T, E)``."""
        x = self.inputs(encoded, tokens, start, viewers)
        states: Tensor = self.transformer_decoder(x, encoded.keys, encoded.mask, caches, start)
        return states

    def class_logits(self, encoded: EncodedScenes, states: Tensor) -> Tensor:
        """Return logits ``(B, K, T, 1 + N)`` of decoder states ``(B, K, T, E)``."""
        if encoded.readout is None:
            every = self.fixed_logits(states)
            return torch.cat([every[..., -2:-1], every[..., :-2]], -1)
        rows, constants = encoded.readout
        logits = (states.flatten(1, 2) @ rows.transpose(1, 2) + constants[:, None]).view(*states.shape[:-1], -1)
        return logits.masked_fill(~encoded.valid[:, None, None], -torch.inf)

    def fixed_logits(self, states: Tensor) -> Tensor:
        """Return the logits of the official fixed vocabulary: objects, end, padding."""
        if self.generator is None:
            raise ShapeError("This model has object attention, no fixed vocabulary.")
        logits: Tensor = self.generator(states)
        return logits

    def pad_logit(self, states: Tensor) -> Tensor:
        """Return the logit ``(..., 1)`` of the official padding class, which takes part in the official loss."""
        if self.generator is not None:
            return self.fixed_logits(states)[..., -1:]
        shape = (*states.shape[:-1], 1)
        return states.new_zeros(shape) if self.readout is None else self.readout.bias.to(states).expand(shape)

    def forward(self, scenes: SceneBatch, paths: Tensor, viewers: Tensor | None = None) -> Tensor:
        """Score every step of given paths.

        Args:
            scenes: B scenes.
            paths: Objects, int64 ``(B, K, T)``, -1 behind the end of a path.
            viewers: int64 ``(B, K)``, -1 for an unknown one; ``None``: all unknown.

        Returns:
            Logits ``(B, K, T + 1, 1 + N)``: column 0 ends the path, column ``i + 1`` is object i. Rows behind the end
            of a path mean nothing.
        """
        encoded = self.encode(scenes)
        return self.class_logits(encoded, self.decode(encoded, self.tokens_of(paths), viewers=viewers))

    def tokens_of(self, paths: Tensor) -> Tensor:
        """Return the decoder's tokens of paths: begin, then the objects; begin again behind the end."""
        return F.pad(paths + 1, (1, 0), value=BEGIN)

    def begin(self, scenes: SceneBatch, num_paths: int, max_length: int, viewers: Tensor | None = None) -> OATPaths:
        """Begin K paths in each scene, to be continued step by step.

        Args:
            scenes: B scenes.
            num_paths: K.
            max_length: Most steps.
            viewers: int64 ``(B, K)``.
        """
        encoded = self.encode(scenes)
        shape = (len(scenes) * num_paths, self.heads, max_length, self.width // self.heads)
        make = encoded.keys[0][0].new_empty
        caches = [KeyCache(make(shape), make(shape)) for _ in self.transformer_decoder.layers]
        return OATPaths(self, encoded, caches, viewers)


class OATPaths:
    """Paths under way: the scenes, and the keys of what each path has visited.

    Args:
        model: The model.
        encoded: The scenes.
        caches: Keys by decoder layer.
        viewers: int64 ``(B, K)`` or ``None``.
    """

    def __init__(self, model: OAT, encoded: EncodedScenes, caches: list[KeyCache], viewers: Tensor | None) -> None:
        self.model, self.encoded, self.caches, self.viewers = model, encoded, caches, viewers
        self.length = 0

    def step(self, tokens: Tensor) -> Tensor:
        """Append tokens ``(B, K)`` (0 at first, then object + 1) and score the next step, ``(B, K, 1 + N)``."""
        states = self.model.decode(
            self.encoded, tokens[..., None], viewers=self.viewers, caches=self.caches, start=self.length
        )
        self.length += 1
        return self.model.class_logits(self.encoded, states)[:, :, 0]

    def reorder(self, index: Tensor) -> None:
        """Go on with paths ``index`` ``(B, K')`` of each scene, which may repeat or leave out some."""
        batch = len(index)
        before = len(self.caches[0].key) // batch
        rows = (index + before * torch.arange(batch, device=index.device)[:, None]).flatten()
        self.caches = [cache.take(rows) for cache in self.caches]
        if self.viewers is not None:
            self.viewers = self.viewers.gather(1, index)


def checkpoint_filter_fn(state: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Translate an official state dict: drop what the model never uses, and insist on the position table.

    The official code keeps the table out of the state dict; add it as ``position.table``.

    Raises:
        CheckpointError: If the table is missing.
    """
    plain = {key.removeprefix("model."): value for key, value in state.items()}
    own = model.state_dict()
    unused = ("onedpositional_encoding.", "LinearEmbedding.", "generator.", "readout.")
    kept = {key: value for key, value in plain.items() if key in own or not key.startswith(unused)}
    if "position.table" in own and "position.table" not in kept:
        raise CheckpointError(
            "The weights come without the position table, which official OAT checkpoints do not hold: "
            "add the file's (R, P) table under the key 'position.table'."
        )
    return kept
