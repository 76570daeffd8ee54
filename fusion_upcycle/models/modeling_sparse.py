"""`Sparse<Dense>`: the MoE of any dense transformers model, FFNs replaced and all else as it is.

This one file is both a module of fusion_upcycle and the code that an output folder ships
(`auto_map`), so it imports torch and transformers alone. Classes are made on demand by the module's
`__getattr__`: `SparseViTModel` from `ViTModel`, `SparseViTConfig` from `ViTConfig`; pickle and
`auto_map` find them by name. A family is a row of `FAMILIES`.

Shapes: B rows, T tokens of a row, N = B * T tokens, E experts, K experts per token, C tokens per
expert, D hidden size, F neurons of an expert.
"""

# mypy: ignore-errors
# Classes are made at run time, of classes that are not known before.

import copy
import inspect
import math
import sys
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
import transformers
from huggingface_hub.dataclasses import strict
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter
from transformers.integrations import use_experts_implementation
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY, OutputRecorder

_THIS = sys.modules[__name__]


def _ffn(layer, up, down, *, gate=None, act="act_fn", at="mlp", inside="{at}.", **more):
    """A form of FFN: where it is in a layer, its matrices, its activation, its dropouts.

    Args:
        layer: class of the module that holds it.
        up, down, gate: names of its matrices.
        act: name of its activation; the class itself where the layer holds no module of it.
        at: name of the FFN in the layer; where it is spread over the layer, that of its first
            module, for which the MoE then stands.
        inside: what stands before the names.
        more: `fused`: `up` holds gate and up; `cleared`: other modules of the layer that belong to
            the FFN; `dropout`: config field of the dropout of its output; `inner_dropout`: of its
            neurons; `zeroed`: attribute of the layer that says the inner dropout too.
    """
    place = inside.format(at=at)
    names = [None if name is None else place + name for name in (gate, up, down)]
    activation = act if isinstance(act, type) else place + act
    form = dict(fused=False, cleared=(), dropout=None, inner_dropout=None, zeroed=None) | more
    return SimpleNamespace(
        layer=layer, at=at, gate=names[0], up=names[1], down=names[2], act=activation, **form
    )


def _glu(layer, **more):
    return _ffn(layer, "up_proj", "down_proj", gate="gate_proj", **more)


def _spread(layer, **more):
    """fc1, activation, fc2 among the layer's own modules."""
    cleared = ("activation_fn", "fc2")
    names = dict(act="activation_fn", at="fc1", inside="")
    return _ffn(layer, "fc1", "fc2", cleared=cleared, **names, **more)


def _bert(layer):
    return _ffn(
        layer,
        "intermediate.dense",
        "output.dense",
        act="intermediate.intermediate_act_fn",
        at="intermediate",
        inside="",
        cleared=("output.dense",),
    )


_FC = partial(_ffn, up="fc1", down="fc2", act="activation_fn")
_4H = partial(_ffn, up="dense_h_to_4h", down="dense_4h_to_h", act="act")
_UP = partial(_ffn, up="up_proj", down="down_proj")
_C_FC = partial(_ffn, up="c_fc", down="c_proj", act="act")
_FUSED = partial(_ffn, up="gate_up_proj", down="down_proj", act="activation_fn", fused=True)
_T5 = partial(
    _ffn, "T5LayerFF", down="wo", act="act", at="DenseReluDense", inner_dropout="dropout_rate"
)

#: Dense `model_type` -> the forms of its FFN.
FAMILIES = {
    "apertus": [_UP("ApertusDecoderLayer")],
    "arcee": [_UP("ArceeDecoderLayer")],
    "bert": [_bert("BertLayer")],
    "biogpt": [
        _spread(
            "BioGptDecoderLayer", inner_dropout="activation_dropout", zeroed="activation_dropout"
        )
    ],
    "clip_vision_model": [_FC("CLIPEncoderLayer")],
    "codegen": [_ffn("CodeGenBlock", "fc_in", "fc_out", act="act", dropout="resid_pdrop")],
    "cohere": [_glu("CohereDecoderLayer")],
    "cohere2": [_glu("Cohere2DecoderLayer")],
    "cwm": [_glu("CwmDecoderLayer")],
    "dinov2": [_FC("Dinov2Layer"), _glu("Dinov2Layer", act=nn.SiLU)],
    "exaone4": [_glu("Exaone4DecoderLayer")],
    "falcon": [_4H("FalconDecoderLayer")],
    "gemma": [_glu("GemmaDecoderLayer")],
    "gemma2": [_glu("Gemma2DecoderLayer")],
    "gemma3_text": [_glu("Gemma3DecoderLayer")],
    "glm": [_FUSED("GlmDecoderLayer")],
    "glm4": [_FUSED("Glm4DecoderLayer")],
    "gpt2": [_C_FC("GPT2Block", dropout="resid_pdrop")],
    "gpt_neo": [_C_FC("GPTNeoBlock", dropout="resid_dropout")],
    "gpt_neox": [_4H("GPTNeoXLayer")],
    "gptj": [_ffn("GPTJBlock", "fc_in", "fc_out", act="act", dropout="resid_pdrop")],
    "granite": [_glu("GraniteDecoderLayer")],
    "helium": [_glu("HeliumDecoderLayer")],
    "hunyuan_v1_dense": [_glu("HunYuanDenseV1DecoderLayer")],
    "jais2": [_UP("Jais2DecoderLayer")],
    "lfm2": [_ffn("Lfm2DecoderLayer", "w3", "w2", gate="w1", at="feed_forward", act=nn.SiLU)],
    "llama": [_glu("LlamaDecoderLayer")],
    "ministral": [_glu("MinistralDecoderLayer")],
    "ministral3": [_glu("Ministral3DecoderLayer")],
    "mistral": [_glu("MistralDecoderLayer")],
    "modernbert": [
        _ffn(
            "ModernBertEncoderLayer",
            "Wi",
            "Wo",
            act="act",
            fused=True,
            inner_dropout="mlp_dropout",
        )
    ],
    "nanochat": [_FC("NanoChatDecoderLayer")],
    "nemotron": [_UP("NemotronDecoderLayer")],
    "olmo": [_glu("OlmoDecoderLayer")],
    "olmo2": [_glu("Olmo2DecoderLayer")],
    "olmo3": [_glu("Olmo3DecoderLayer")],
    "opt": [_spread("OPTDecoderLayer")],
    "persimmon": [_4H("PersimmonDecoderLayer")],
    "phi": [_FC("PhiDecoderLayer")],
    "phi3": [_FUSED("Phi3DecoderLayer")],
    "qwen2": [_glu("Qwen2DecoderLayer")],
    "qwen3": [_glu("Qwen3DecoderLayer")],
    "roberta": [_bert("RobertaLayer")],
    "seed_oss": [_glu("SeedOssDecoderLayer", dropout="residual_dropout")],
    "siglip_vision_model": [_FC("SiglipEncoderLayer")],
    "smollm3": [_glu("SmolLM3DecoderLayer")],
    "stablelm": [_glu("StableLmDecoderLayer")],
    "starcoder2": [_C_FC("Starcoder2DecoderLayer", dropout="residual_dropout")],
    "t5": [_T5(up="wi_1", gate="wi_0"), _T5(up="wi")],
    "vaultgemma": [_glu("VaultGemmaDecoderLayer")],
    "vit": [_FC("ViTLayer")],
    "xglm": [
        _spread("XGLMDecoderLayer", inner_dropout="activation_dropout", zeroed="activation_dropout")
    ],
}

#: Families in which a token sees those behind it, so that experts may choose among all of a text.
BIDIRECTIONAL = frozenset(
    {"bert", "clip_vision_model", "dinov2", "modernbert", "roberta", "siglip_vision_model", "vit"}
) | {"t5"}  # its encoder

ROUTINGS = ("token_choice", "expert_choice", "hash")

#: What a sparse config says beside the dense one.
SPARSE_FIELDS = {
    "num_experts": (int, 8),
    "num_experts_per_tok": (int, 2),
    "moe_layers": (list[int] | None, None),  # indices of FFNs, a T5's encoder first; None: all
    "moe_intermediate_size": (int | None, None),  # None: the dense FFN's
    "shared_expert_intermediate_size": (int, 0),
    "moe_routing": (str, "token_choice"),
    "scoring_func": (str, "softmax"),  # or sigmoid
    "norm_topk_prob": (bool, True),  # weights of a token are divided by their sum
    "capacity_factor": (float, 2.0),  # of expert choice: experts per token, on average
    "routing_group": (str, "batch"),  # of expert choice: or sequence
}

#: What a forward pass was given: `input_ids` [B, T] for hash routing, `mask` [B, T] of what is no
#: padding for expert choice. No tensor is ever kept on a module, which may be copied.
_GIVEN: ContextVar[SimpleNamespace | None] = ContextVar("given", default=None)


@contextmanager
def _given(inputs):
    token = _GIVEN.set(inputs)
    try:
        yield
    finally:
        _GIVEN.reset(token)


@use_experts_implementation
class SparseExperts(nn.Module):
    """E FFNs, packed: gate above up [E, 2F, D], or up alone [E, F, D], and down [E, D, F]."""

    def __init__(self, config, form, count, size):
        super().__init__()
        self.num_experts, self.hidden_dim, self.intermediate_dim = count, form.hidden_size, size
        self.inner_dropout, self._activation = form.inner_dropout_rate, (form.activation,)
        self.rows = "gate_up_proj" if form.gated else "up_proj"
        wide = size * (2 if form.gated else 1)
        self.register_parameter(self.rows, _empty(count, wide, form.hidden_size))
        self.down_proj = _empty(count, form.hidden_size, size)
        if form.bias:
            self.register_parameter(f"{self.rows}_bias", _empty(count, wide))
            self.down_proj_bias = _empty(count, form.hidden_size)

    def act_fn(self, x):
        # The activation is the layer's own module, which may have parameters: registered there.
        return F.dropout(self._activation[0](x), self.inner_dropout, self.training)

    def one(self, expert, x):
        """One expert on [N, D]."""
        x = F.linear(x, getattr(self, self.rows)[expert], self._bias(self.rows, expert))
        x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
        return F.linear(x, self.down_proj[expert], self._bias("down_proj", expert))

    def _bias(self, name, expert):
        return getattr(self, f"{name}_bias")[expert] if self.has_bias else None

    def forward(self, hidden_states, top_k_index, top_k_weights):
        output = torch.zeros_like(hidden_states)
        for expert in range(self.num_experts):
            tokens, slots = torch.where(top_k_index == expert)
            if len(tokens):
                found = self.one(expert, hidden_states[tokens])
                weighted = found * top_k_weights[tokens, slots, None].to(found.dtype)
                output.index_add_(0, tokens, weighted.to(output.dtype))
        return output


class SparseRouter(nn.Module):
    """Logits [N, E], and who is sent where: weights and experts [N, K], or [E, C] tokens."""

    def __init__(self, config, hidden_size, routing):
        super().__init__()
        self.num_experts, self.top_k = config.num_experts, config.num_experts_per_tok
        self.scores, self.normalised = config.scoring_func, config.norm_topk_prob
        self.capacity_factor, self.group = config.capacity_factor, config.routing_group
        self.routing = routing
        self.weight = _empty(config.num_experts, hidden_size)

    def forward(self, hidden_states):
        """Route [B, T, D].

        Returns:
            Logits [N, E]; weights and experts of each token [N, K]. In expert choice, weights
            [E, C] and the tokens [E, C] that each expert chose, 0 to N - 1.
        """
        x = hidden_states.flatten(0, -2)
        # Rounding to half precision would send tokens elsewhere than training meant.
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = F.linear(x.to(wide), self.weight.to(wide))
        scores = logits.softmax(-1) if self.scores == "softmax" else logits.sigmoid()
        if self.routing == "expert_choice":
            return logits, *self._chosen_tokens(scores, hidden_states.shape[:-1])
        weights, experts = scores.topk(self.top_k, -1)
        if self.normalised:
            weights = weights / weights.sum(-1, keepdim=True)
        return logits, weights, experts

    def _chosen_tokens(self, scores, shape):
        """Expert choice (Zhou et al., arXiv 2202.09368): weights and tokens, [E, C] both."""
        given = _GIVEN.get()
        kept = None if given is None else given.mask
        if kept is not None:
            if kept.shape != shape:
                raise ValueError(
                    f"expert choice needs an attention_mask of shape {list(shape)}, of what is no "
                    f"padding; it is {list(kept.shape)}"
                )
            scores = scores.masked_fill(kept.reshape(-1, 1) == 0, 0.0)
        groups = shape[0] if self.group == "sequence" and len(shape) > 1 else 1
        size = len(scores) // groups
        capacity = min(size, math.ceil(self.capacity_factor * size / self.num_experts))
        by_group = scores.view(groups, size, -1).transpose(1, 2)
        weights, tokens = by_group.topk(capacity, -1)
        first = torch.arange(groups, device=scores.device)[:, None, None] * size
        weights, tokens = (t.transpose(0, 1).flatten(1) for t in (weights, tokens + first))
        if self.normalised:
            total = weights.new_zeros(len(scores)).index_add(0, tokens.flatten(), weights.flatten())
            # Padding has weight 0 everywhere, and stays at 0.
            weights = weights / total[tokens].clamp(min=torch.finfo(total.dtype).tiny)
        return weights, tokens


class SparseMLP(nn.Module):
    """What stands in for a layer's FFN."""

    def __init__(self, config, form, routing):
        super().__init__()
        self.routing, self.num_experts = routing, config.num_experts
        size = config.moe_intermediate_size or form.intermediate_size
        self.experts = _experts(config, form, config.num_experts, size)
        if shared := config.shared_expert_intermediate_size:
            self.shared_expert = _experts(config, form, 1, shared)
        if routing == "hash":
            shape = (config.vocab_size, config.num_experts_per_tok)
            self.register_buffer("hash_table", torch.zeros(shape, dtype=torch.int64))
        else:
            self.gate = SparseRouter(config, form.hidden_size, routing)
        setattr(self, form.activation_name, form.activation)  # where the dense model has it
        self.dropout = nn.Dropout(form.dropout_rate)

    def forward(self, hidden_states, *_, **__):
        x = hidden_states.flatten(0, -2)
        if self.routing == "token_choice":
            _, weights, experts = self.gate(hidden_states)
            output = self.experts(x, experts, weights.to(x.dtype))
        elif self.routing == "hash":
            experts = self.hash_table[given_token_ids(hidden_states)].flatten(0, -2)
            weights = x.new_full((1, 1), 1 / experts.shape[-1]).expand(experts.shape)
            output = self.experts(x, experts, weights)
        else:
            _, weights, tokens = self.gate(hidden_states)
            experts = torch.arange(self.num_experts, device=x.device)[:, None].expand_as(tokens)
            tokens, experts = tokens.flatten(), experts.reshape(-1, 1)
            found = self.experts(x[tokens], experts, weights.reshape(-1, 1).to(x.dtype))
            output = torch.zeros_like(x).index_add(0, tokens, found)
        if hasattr(self, "shared_expert"):
            output = output + self.shared_expert.one(0, x)
        return self.dropout(output.view_as(hidden_states))


def given_token_ids(hidden_states):
    """Token ids [B, T] of what a layer is given, for whoever is called within a forward pass."""
    given = _GIVEN.get()
    ids = None if given is None else given.input_ids
    if ids is None or ids.numel() != hidden_states.shape[:-1].numel():
        raise ValueError("hash routing goes by token: give the model input_ids, one for each token")
    return ids


def _empty(*shape):
    return nn.Parameter(torch.empty(shape))


def _experts(config, form, count, size):
    experts = SparseExperts(config, form, count, size)
    experts.has_gate, experts.has_bias = form.gated, form.bias
    return experts


def _at(module, path):
    for name in path.split("."):
        module = getattr(module, name, None)
    return module


def find_ffns(model, model_type):
    """The FFNs of a dense model: (name of the layer, the layer, its form), in order.

    Raises:
        ValueError: FFNs of a form that is not known.
    """
    forms, found = FAMILIES[model_type], []
    for name, layer in model.named_modules():
        if type(layer).__name__ == forms[0].layer:
            form = next((form for form in forms if _at(layer, form.up) is not None), None)
            if form is None:
                raise ValueError(f"{model_type}: the FFN of {name} is not {forms[0].up} and so on")
            found.append((name, layer, form))
    if not found:
        raise ValueError(f"there is no {forms[0].layer} in {type(model).__name__}")
    return found


def _measured(layer, form, config):
    """A form with the sizes, activation and dropout rates that it has in this layer."""
    up = _at(layer, form.up)
    rows, hidden = up.weight.shape
    if type(up).__name__ == "Conv1D":  # GPT-2's, which is transposed
        rows, hidden = hidden, rows
    own = None if isinstance(form.act, type) else _at(layer, form.act)
    return SimpleNamespace(
        hidden_size=hidden,
        intermediate_size=rows // 2 if form.fused else rows,
        gated=form.fused or form.gate is not None,
        bias=up.bias is not None,
        activation=form.act() if own is None else own,
        activation_name="act_fn" if own is None else form.act.rpartition(".")[2],
        dropout_rate=getattr(config, form.dropout) if form.dropout else 0.0,
        inner_dropout_rate=getattr(config, form.inner_dropout) if form.inner_dropout else 0.0,
    )


def _make_sparse(model, config):
    """Put a `SparseMLP` in the place of each FFN of the layers that `moe_layers` names."""
    if any(isinstance(module, SparseMLP) for module in model.modules()):
        return  # the base model inside was made as ours
    if config.moe_routing not in ROUTINGS:
        raise ValueError(f"moe_routing={config.moe_routing!r} must be one of {ROUTINGS}")
    dense_type = config.dense_model_type
    ffns = find_ffns(model, dense_type)
    for index, (name, layer, form) in enumerate(ffns):
        if config.moe_layers is not None and index not in config.moe_layers:
            continue
        routing = config.moe_routing
        if routing == "expert_choice":
            if dense_type not in BIDIRECTIONAL or getattr(config, "is_decoder", False):
                raise ValueError(f"expert choice sees the whole text, and {dense_type} must not")
            if "decoder." in f"{name}.":
                routing = "token_choice"  # T5's
        made = SparseMLP(config, _measured(layer, form, config), routing)
        layer.set_submodule(form.at, made)
        for path in form.cleared:
            layer.set_submodule(path, nn.Identity())
        if form.zeroed is not None:
            setattr(layer, form.zeroed, 0.0)


class SparseMixin:
    """What a dense model's class needs to be the sparse one's."""

    @classmethod
    def _can_set_experts_implementation(cls):
        return True

    @classmethod
    def _can_set_attn_implementation(cls):
        return cls.__mro__[2]._can_set_attn_implementation()

    def _check_and_adjust_experts_implementation(self, requested):
        wanted = super()._check_and_adjust_experts_implementation(requested)
        if "_sparse_ready" in self.__dict__:
            return wanted
        self.__dict__["_wanted_experts"] = wanted  # dense classes inside accept eager alone
        return "eager"

    def post_init(self):
        _make_sparse(self, self.config)
        for module in self.modules():  # base models inside become their sparse class as well
            inside = isinstance(module, PreTrainedModel) and not isinstance(module, SparseMixin)
            if inside and isinstance(module.config, type(self.config)):
                module.__class__ = model_class(type(module))
                _CAN_RECORD_REGISTRY[module] = module._can_record_outputs
                module.__dict__["_sparse_ready"] = True
                module.config._experts_implementation_internal = self._wanted_experts
        self.__dict__["_sparse_ready"] = True
        self.config._experts_implementation_internal = self._wanted_experts
        super().post_init()

    def __call__(self, *args, **kwargs):
        if self.config.moe_routing == "token_choice":
            return super().__call__(*args, **kwargs)
        names = inspect.signature(self.forward).parameters
        said = dict(zip(names, args, strict=False)) | kwargs
        ids, mask = said.get("input_ids"), said.get("attention_mask")
        mask = mask if mask is None or mask.dim() == 2 else None
        with _given(SimpleNamespace(input_ids=ids, mask=mask)):
            return super().__call__(*args, **kwargs)

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=None, **more):
        def run_again(function, *args, **kwargs):
            """Runs the layer in the backward pass with what the forward pass was given."""
            inputs = _GIVEN.get()

            def layer(*args):
                with _given(inputs):
                    return function(*args)

            return gradient_checkpointing_func(layer, *args, **kwargs)

        checkpoint = None if gradient_checkpointing_func is None else run_again
        super()._set_gradient_checkpointing(enable, checkpoint, **more)

    @torch.no_grad()
    def _init_weights(self, module):
        std = getattr(self.config, "initializer_range", 0.02)
        if isinstance(module, SparseExperts):
            for name, parameter in module.named_parameters(recurse=False):
                init.zeros_(parameter) if "bias" in name else init.normal_(parameter, 0.0, std)
        elif isinstance(module, SparseRouter):
            init.normal_(module.weight, 0.0, std)
        elif isinstance(module, SparseMLP):
            if module.routing == "hash":
                spread = torch.arange(module.hash_table.numel()).view(module.hash_table.shape)
                init.copy_(module.hash_table, spread % module.num_experts)
        else:
            super()._init_weights(module)


def up_name(model_type, gated):
    """What files call an expert's `up`: `fc1` without a gate, in families that know both forms."""
    mixed = len({form.fused or form.gate is not None for form in FAMILIES[model_type]}) > 1
    return "fc1" if mixed and not gated else "up_proj"


def _converters(model_type):
    """One tensor per expert and matrix in the files, packed in memory."""
    found, merge = [], MergeModulelist(dim=0)
    gates = {form.fused or form.gate is not None for form in FAMILIES[model_type]}
    for experts in ("experts", "shared_expert"):
        for kind, suffix in (("weight", ""), ("bias", "_bias")):
            names = f".{experts}.*.{{}}.{kind}"
            parts = {"down_proj": "down_proj"}
            if False in gates:
                parts["up_proj"] = up_name(model_type, False)
            for live, part in parts.items():
                one = [names.format(part)]
                found.append(WeightConverter(one, f".{experts}.{live}{suffix}", [merge]))
            if True in gates:
                halves = [names.format(part) for part in ("gate_proj", "up_proj")]
                packed = f".{experts}.gate_up_proj{suffix}"
                found.append(WeightConverter(halves, packed, [merge, Concatenate(dim=1)]))
    return found


def _register_converters(name, dense_converters, model_type):
    """The dense family's file names stay, and the experts get theirs."""
    own = copy.deepcopy(list(dense_converters or []))
    register_checkpoint_conversion_mapping(name, own + _converters(model_type), overwrite=True)


def config_class(dense):
    """The sparse config's class for a dense one's."""
    name = f"Sparse{dense.__name__}"
    if name in vars(_THIS):
        return vars(_THIS)[name]
    at = FAMILIES[dense.model_type][0].at
    plan = dense.base_model_tp_plan or {}
    fields = {
        "model_type": f"sparse_{dense.model_type}",
        "dense_model_type": dense.model_type,
        "base_model_tp_plan": {k: v for k, v in plan.items() if f".{at}." not in k},
        "__module__": __name__,
        "__doc__": f"`{dense.__name__}`, and what its experts are.",
        "__annotations__": {field: kind for field, (kind, _) in SPARSE_FIELDS.items()},
        **{field: default for field, (_, default) in SPARSE_FIELDS.items()},
    }
    made = strict(type(name, (dense,), fields))
    setattr(_THIS, name, made)
    dense_converters = get_checkpoint_conversion_mapping(dense.model_type)
    _register_converters(made.model_type, dense_converters, dense.model_type)
    # Some heads (`Gemma2ForSequenceClassification`) ask `AutoModel` for what is below them.
    base = transformers.AutoModel._model_mapping[dense]
    transformers.AutoModel.register(made, model_class(base), exist_ok=True)
    return made


def model_class(dense):
    """The sparse model's class for a dense one's."""
    name = f"Sparse{dense.__name__}"
    if name in vars(_THIS):
        return vars(_THIS)[name]
    router_logits = OutputRecorder(SparseRouter, index=0)
    fields = {
        "config_class": config_class(dense.config_class),
        "_can_record_outputs": {
            **(dense._can_record_outputs or {}),
            "router_logits": router_logits,
        },
        "__module__": __name__,
        "__doc__": f"`{dense.__name__}` with experts.",
    }
    made = type(name, (SparseMixin, dense), fields)
    if by_name := get_checkpoint_conversion_mapping(dense.__name__):
        _register_converters(name, by_name, dense.config_class.model_type)
    setattr(_THIS, name, made)
    return made


def __getattr__(name):
    dense = getattr(transformers, name.removeprefix("Sparse"), None)
    if name.startswith("Sparse") and isinstance(dense, type):
        is_model = issubclass(dense, PreTrainedModel)
        config = dense.config_class if is_model else dense
        if getattr(config, "model_type", None) in FAMILIES:
            return model_class(dense) if is_model else config_class(dense)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
