"""One pass for sampling: the weights of a GPT-NeoX, Llama, Qwen2 or GPT-2, a static KV cache, and nothing else.

The same numbers as the Hugging Face model's own pass, up to rounding, in less time where what stands around the
arithmetic costs more than the arithmetic. Other architectures are sampled by their own pass (rlhf/model/sampling.py).
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rlhf.training import distributed
from rlhf.training.hardware import in_bf16

Affine = tuple[Tensor, Tensor | None]  # weight [out, in], bias [out]
FIXED_ROPES = ("default", "linear", "llama3")


@dataclass(frozen=True)
class Block:
    """A transformer block. `gated`: `up` holds the gate and the value of a gated MLP, one above the other."""

    norm: Callable[[Tensor], Tensor]
    qkv: Affine
    out: Affine
    mlp_norm: Callable[[Tensor], Tensor]
    up: Affine
    down: Affine
    act: Callable[[Tensor], Tensor]
    gated: bool
    parallel: bool
    scaling: float


@dataclass
class KVCache:
    """Keys and values of every block: [rows, kv heads, columns, head width] each; a token's column is its position."""

    keys: list[Tensor]
    values: list[Tensor]

    def keep(self, rows: Tensor) -> None:
        """Cuts to some rows."""
        self.keys = [item[rows] for item in self.keys]
        self.values = [item[rows] for item in self.values]

    def copy(self, source: Tensor, target: Tensor, columns: int) -> None:
        """The first columns of some rows into others."""
        for item in (*self.keys, *self.values):
            item[target, :, :columns] = item[source, :, :columns]


class Decoder:
    """Built from a model's weights as they are now, tensor by tensor where it is sharded. Matrices are kept in bfloat16
    where `in_bf16(precision)`, keys and values too unless the steps run on a CPU and are not `compiled`."""

    def __init__(self, model: PreTrainedModel, precision: str, compiled: bool = False) -> None:
        config = model.config
        self.dtype = torch.bfloat16 if in_bf16(precision) else torch.float32
        # On a CPU torch's products with single rows are faster in float32 than in bfloat16.
        self.kept = self.dtype if compiled or model.device.type == "cuda" else torch.float32
        self.heads = config.num_attention_heads
        self.kv_heads = getattr(config, "num_key_value_heads", None) or self.heads
        self.head_width = getattr(config, "head_dim", None) or config.hidden_size // self.heads
        base = model.base_model
        self.embed, self.rotary = whole(model.get_input_embeddings()), getattr(base, "rotary_emb", None)
        self.position_embeddings = None if self.rotary else whole(base.wpe)
        read = {"gpt_neox": self._neox, "gpt2": self._gpt2}.get(config.model_type, self._llama)
        self.blocks = [read(layer) for layer in (base.h if config.model_type == "gpt2" else base.layers)]
        final = {"gpt_neox": "final_layer_norm", "gpt2": "ln_f"}.get(config.model_type, "norm")
        self.final = whole(getattr(base, final))
        self.head = self._affine(model.get_output_embeddings())

    # --- weights ---------------------------------------------------------------------------------------------

    def _affine(self, *modules: Any) -> Affine:
        """Weight and bias of modules one above the other, adapters merged."""
        weights = [weight_of(module) for module in modules]
        biases: list[Any] = [getattr(module, "base_layer", module).bias for module in modules]
        weight = torch.cat(weights) if len(weights) > 1 else weights[0]
        bias = None if biases[0] is None else torch.cat([distributed.full_tensor(item) for item in biases])
        return weight.to(self.dtype), None if bias is None else bias.to(self.dtype)

    def _neox(self, layer: Any) -> Block:
        attention, mlp = layer.attention, layer.mlp
        weight, bias = self._affine(attention.query_key_value)
        order = torch.arange(len(weight), device=weight.device).view(self.heads, 3, -1).transpose(0, 1).flatten()
        return Block(whole(layer.input_layernorm), (weight[order], None if bias is None else bias[order]),
                     self._affine(attention.dense), whole(layer.post_attention_layernorm),
                     self._affine(mlp.dense_h_to_4h),
                     self._affine(mlp.dense_4h_to_h), mlp.act, False, bool(layer.use_parallel_residual),
                     attention.scaling)

    def _llama(self, layer: Any) -> Block:
        attention, mlp = layer.self_attn, layer.mlp
        return Block(whole(layer.input_layernorm), self._affine(attention.q_proj, attention.k_proj, attention.v_proj),
                     self._affine(attention.o_proj), whole(layer.post_attention_layernorm),
                     self._affine(mlp.gate_proj, mlp.up_proj), self._affine(mlp.down_proj), mlp.act_fn, True, False,
                     attention.scaling)

    def _gpt2(self, layer: Any) -> Block:
        attention, mlp = layer.attn, layer.mlp
        return Block(whole(layer.ln_1), self._affine(attention.c_attn), self._affine(attention.c_proj),
                     whole(layer.ln_2),
                     self._affine(mlp.c_fc), self._affine(mlp.c_proj), mlp.act, False, False,
                     getattr(attention, "scaling", self.head_width**-0.5))

    # --- passes ----------------------------------------------------------------------------------------------

    def new_cache(self, rows: int, columns: int) -> KVCache:
        shape = (rows, self.kv_heads, columns, self.head_width)
        device = self.head[0].device
        empty = [torch.zeros(shape, dtype=self.kept, device=device) for _ in range(2 * len(self.blocks))]
        return KVCache(empty[::2], empty[1::2])

    def rope(self, columns: int) -> tuple[Tensor, Tensor] | None:
        """Cosines and sines of the positions 0 .. columns-1: [columns, width] each; None with learned positions."""
        if self.rotary is None:
            return None
        positions = torch.arange(columns, device=self.head[0].device).unsqueeze(0)
        cos, sin = self.rotary(torch.zeros((), device=positions.device), positions)
        return cos[0], sin[0]

    def hidden(self, ids: Tensor, positions: Tensor, cache: KVCache, rows: Tensor | None,
               rope: tuple[Tensor, Tensor] | None, columns: Tensor | None, last: Tensor | None = None) -> Tensor:
        """Hidden states after the final norm, [n, T, d], of tokens that go into `rows` of the cache at `positions`.

        ids, positions [n, T]; rows [n], None for all of them. Either one token a row, which sees those of the `columns`
        0 .. C-1 that are not beyond its own, or texts from position 0 on (None), right-padded. What lies further right
        does not matter: PADs, an older text. `last` [n]: the only token of each row whose state is wanted, [n, 1, d].
        """
        state = self.embed(ids).float()
        if rope is None:
            assert self.position_embeddings is not None
            state = state + self.position_embeddings(positions)
            turn = None
        else:
            turn = tuple(part[positions].unsqueeze(1) for part in rope)
        bias = None
        if columns is not None:
            seen = columns <= positions.unsqueeze(-1)
            bias = torch.zeros(seen.shape, device=ids.device, dtype=self.kept)
            bias = bias.masked_fill(~seen, float("-inf"))[:, None]
        for number, block in enumerate(self.blocks):
            attended = self._attend(block, number, block.norm(state), positions, cache, rows, turn, bias)
            if last is not None and block is self.blocks[-1]:
                picked = torch.arange(len(ids), device=ids.device)
                state, attended = state[picked, last].unsqueeze(1), attended[picked, last].unsqueeze(1)
            if block.parallel:
                state = state + attended + self._mlp(block, block.mlp_norm(state))
            else:
                state = state + attended
                state = state + self._mlp(block, block.mlp_norm(state))
        return self.final(state)

    def _attend(self, block: Block, number: int, state: Tensor, positions: Tensor, cache: KVCache, rows: Tensor | None,
                turn: Any, bias: Tensor | None) -> Tensor:
        count, length = positions.shape
        mixed = F.linear(state.to(self.dtype), *block.qkv).view(count, length, -1, self.head_width).transpose(1, 2)
        query_key, value = mixed.split((self.heads + self.kv_heads, self.kv_heads), dim=1)
        if turn is not None:
            query_key = rotate(query_key, *turn)
        query, key = query_key.split((self.heads, self.kv_heads), dim=1)
        keys, values = cache.keys[number], cache.values[number]
        place = (torch.arange(count, device=positions.device) if rows is None else rows).unsqueeze(1)
        keys[place, :, positions] = key.transpose(1, 2).to(self.kept)
        values[place, :, positions] = value.transpose(1, 2).to(self.kept)
        if bias is None:
            mixed = F.scaled_dot_product_attention(query.to(self.dtype), key.to(self.dtype), value, is_causal=True,
                                                   scale=block.scaling, enable_gqa=self.heads != self.kv_heads)
        else:
            columns = bias.shape[-1]
            keys, values = ((item if rows is None else item[rows])[:, :, :columns] for item in (keys, values))
            mixed = self._mix(query.to(self.kept), keys, values, bias, block.scaling)
        mixed = mixed.transpose(1, 2).reshape(count, length, -1).to(self.dtype)
        return F.linear(mixed, *block.out)

    def _mix(self, query: Tensor, keys: Tensor, values: Tensor, bias: Tensor, scaling: float) -> Tensor:
        """Attention of single tokens: query [n, heads, 1, w], keys and values [n, kv heads, columns, w] -> as query."""
        if query.is_cuda:
            return F.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=scaling,
                                                  enable_gqa=self.heads != self.kv_heads)
        # a quarter of the fused one's time for single tokens on a CPU
        count, _, length, width = query.shape
        grouped = query.reshape(count, self.kv_heads, -1, width)  # the heads that share keys
        if torch.compiler.is_compiling():  # becomes two loops, which read bfloat16 and add up in float32
            scores = (grouped.float().unsqueeze(3) * keys.float().unsqueeze(2)).sum(4) * scaling + bias
            shares = torch.softmax(scores, dim=-1)
            return (shares.unsqueeze(4) * values.float().unsqueeze(2)).sum(3).view(query.shape)
        scores = (grouped @ keys.transpose(2, 3)).view(count, self.heads, length, -1) * scaling + bias
        shares = torch.softmax(scores, dim=-1).view(count, self.kv_heads, -1, keys.shape[2])
        return (shares @ values).view(query.shape)

    def _mlp(self, block: Block, state: Tensor) -> Tensor:
        inner = F.linear(state.to(self.dtype), *block.up)
        if block.gated:
            gate, inner = inner.chunk(2, dim=-1)
            return F.linear(block.act(gate) * inner, *block.down)
        return F.linear(block.act(inner), *block.down)

    def logits(self, state: Tensor) -> Tensor:
        """Next-token logits, float32: [..., d] -> [..., V]."""
        return F.linear(state.to(self.dtype), *self.head).float()


def rotate(state: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on the first cos.shape[-1] entries of each head [Su et al. 2021], in float32."""
    width = cos.shape[-1]
    rotated = state[..., :width].float()
    one, other = rotated.chunk(2, dim=-1)
    rotated = rotated * cos + torch.cat((-other, one), dim=-1) * sin
    return rotated if width == state.shape[-1] else torch.cat((rotated, state[..., width:].float()), dim=-1)


def whole(module: Any) -> Any:
    """A norm or an embedding with all its weights: itself, or of a sharded model a copy that holds them in float32."""
    if not any(distributed.is_dtensor(item) for item in module.parameters()):
        return module
    copied = copy.copy(module)
    copied._parameters = {name: None if item is None else
                          torch.nn.Parameter(distributed.full_tensor(item.detach()).float(), requires_grad=False)
                          for name, item in module._parameters.items()}
    return copied


def weight_of(module: Any) -> Tensor:
    """The weight [out, in] that a linear layer applies: active LoRA adapters added, GPT-2's layers transposed, NF4
    dequantised."""
    inner = getattr(module, "base_layer", module)
    weight = distributed.full_tensor(inner.weight.detach())
    if inner is not module and not module.disable_adapters:
        weight = weight + sum(delta_of(module, name) for name in module.active_adapters)
    return weight.t() if isinstance(inner, Conv1D) else weight


def delta_of(module: Any, adapter: str) -> Tensor:
    """What an adapter adds to a layer's weight, as that is stored: (alpha / rank)·B·A."""
    down, up = (distributed.full_tensor(part[adapter].weight.detach()) for part in (module.lora_A, module.lora_B))
    delta: Tensor = module.scaling[adapter] * (up @ down)
    return delta.t() if module.fan_in_fan_out else delta


def decoder_for(model: PreTrainedModel, precision: str, compiled: bool = False) -> Decoder | None:
    """A decoder of the model's weights as they are now; None for an architecture or a position code without one."""
    config = model.config
    ropes = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    layers = set(getattr(config, "layer_types", None) or ["full_attention"])
    plain = ropes in FIXED_ROPES and layers == {"full_attention"}
    if config.model_type not in ("gpt_neox", "llama", "qwen2", "gpt2") or not plain:
        return None
    return Decoder(model, precision, compiled)
