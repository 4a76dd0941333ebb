"""Quantised models: served exactly where they can be, and KV never crosses from one way of quantising to another."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers.integrations.gguf.utils import GgufEmbedding, GgufLinear

from tests.model._lab import BLOCK, Lab, assert_equal_bits, environment_of_a_child, random_ids, run, run_full, tokens

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.filterwarnings(
    # bitsandbytes and torchao ask torch for things of older names.
    "ignore:`torch.jit.script_method` is deprecated:DeprecationWarning",
    # What the tests of it are about.
    r"ignore:torch\.ao\.quantization is deprecated:DeprecationWarning",
    r"ignore:torch\.quantize_per_tensor, torch\.quantize_per_channel:UserWarning",
)

PROMPT = random_ids(5 * BLOCK + 9)
WHOLE = PROMPT.shape[1] - 1
EDGE = 5 * BLOCK


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Any) -> Path:
    """A tiny model on disk, as it was before anyone quantised it."""
    path = tmp_path_factory.mktemp("plain")
    tiny_llama().save_pretrained(path)
    return path


def load(folder: Path, quantization_config: Any = None) -> Any:
    from transformers import AutoModelForCausalLM

    options = {} if quantization_config is None else {"quantization_config": quantization_config}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **options).eval()


def four_bits(folder: Path, kind: str = "nf4", double: bool = True) -> Any:
    from transformers import BitsAndBytesConfig

    return load(
        folder,
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_use_double_quant=double),
    )


def eight_bits(folder: Path, threshold: float = 0.0) -> Any:
    from transformers import BitsAndBytesConfig

    return load(folder, BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold))


def torchao(folder: Path, name: str = "Int8WeightOnlyConfig") -> Any:
    import torchao.quantization
    from transformers import TorchAoConfig

    return load(folder, TorchAoConfig(getattr(torchao.quantization, name)()))


def dynamic(folder: Path, dtype: torch.dtype = torch.qint8) -> Any:
    return torch.ao.quantization.quantize_dynamic(load(folder), {torch.nn.Linear}, dtype=dtype)


class PackedLinear(GgufLinear):
    """Does for a few tokens, where its base needs a kernel, what that does for many: unpacks in the forward."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._unpack_matmul(x.reshape(-1, self.in_features)).reshape(*x.shape[:-1], self.out_features)


def gguf(folder: Path, name: str = "Q8_0") -> Any:
    """The layers with which transformers keeps GGUF weights packed, put in as its loader does.

    The loader itself needs a package of kernels.
    """
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize

    kind = GGMLQuantizationType[name]
    model = load(folder)
    for path, module in list(model.named_modules()):
        if not isinstance(module, torch.nn.Linear | torch.nn.Embedding):
            continue
        rows, width = module.weight.shape
        if isinstance(module, torch.nn.Linear):
            packed: Any = PackedLinear(width, rows, int(kind))
        else:
            packed = GgufEmbedding(rows, width, int(kind), dtype=torch.float32)
        packed.weight.data = torch.from_numpy(quantize(module.weight.detach().numpy(), kind))
        model.set_submodule(path, packed)
    return model.eval()


SERVED: dict[str, Callable[[Path], Any]] = {
    "bitsandbytes nf4": four_bits,
    "bitsandbytes nf4, scales as they are": lambda folder: four_bits(folder, double=False),
    "bitsandbytes fp4": lambda folder: four_bits(folder, "fp4"),
    "bitsandbytes int8": eight_bits,
    "torchao int8": torchao,
    "torchao int8, inputs too": lambda folder: torchao(folder, "Int8DynamicActivationInt8WeightConfig"),
    "torch float16": lambda folder: dynamic(folder, torch.float16),
    "GGUF Q8_0": gguf,
    "GGUF Q4_0": lambda folder: gguf(folder, "Q4_0"),
}
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "bitsandbytes int8 with outliers": (lambda folder: eight_bits(folder, 6.0), "depends on all tokens of a forward"),
    "torch int8": (dynamic, "gives other logits than one forward"),
}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(PROMPT).logits


@pytest.mark.parametrize("kind", SERVED)
def test_served_exactly(lab: Lab, folder: Path, kind: str) -> None:
    model = SERVED[kind](folder)
    before = logits(model)
    plain = run_full(model, PROMPT)
    store = lab.store()
    cached = lab.wrap(model, store, deterministic=True)
    assert torch.equal(logits(model), before)
    assert cached.support is None
    cold = run_full(cached, PROMPT)
    assert cached.usage.cached_tokens == 0
    assert tokens(cold) == tokens(plain)
    for tier in ("live", "cpu", "disk"):
        if tier == "live":
            run(cached, PROMPT)  # the cache of the call before went to its caller
        lab.leave_only(cached, tier)
        assert_equal_bits(run_full(cached, PROMPT), cold)
        assert cached.usage.cached_tokens_by_tier == {tier: EDGE}
    assert torch.equal(logits(model), before)
    again = lab.wrap(SERVED[kind](folder), store, deterministic=True)
    assert again.fingerprint == cached.fingerprint
    assert_equal_bits(run_full(again, PROMPT), cold)
    assert again.usage.cached_tokens == EDGE


@pytest.mark.parametrize("kind", REFUSED)
def test_refused_in_words(lab: Lab, folder: Path, kind: str) -> None:
    make, reason = REFUSED[kind]
    model = make(folder)
    before = logits(model)
    expected = tokens(run(model, PROMPT))
    cached = lab.wrap(model)
    assert torch.equal(logits(model), before)
    assert cached.support is not None
    assert reason in cached.support
    with pytest.warns(UserWarning, match=reason):
        assert tokens(run(cached, PROMPT)) == expected
    assert tokens(run(cached, PROMPT)) == expected
    assert cached.usage.bypass_reason == cached.support


def test_no_way_of_quantising_shares_with_another(lab: Lab, folder: Path, tiny_llama: Any, tmp_path: Path) -> None:
    tiny_llama(seed=1).save_pretrained(tmp_path / "other")
    store = lab.store()
    seen: list[str] = []
    for make in (load, *SERVED.values()):
        for path in (folder, tmp_path / "other"):
            cached = lab.wrap(make(path), store)
            run(cached, PROMPT)
            assert cached.usage.cached_tokens == 0
            assert cached.usage.bypass_reason is None
            seen.append(cached.fingerprint["weights"])
    assert len(set(seen)) == len(seen)


# ------------------------------------------------------------------------------------- edits between two calls


def projection(model: Any) -> Any:
    return model.model.layers[1].mlp.down_proj


def scales_of_four_bits(model: Any) -> None:
    projection(model).weight.quant_state.absmax.mul_(1.5)


def packed_four_bits(model: Any) -> None:
    projection(model).weight.data ^= 0x31


def type_of_four_bits(model: Any) -> None:
    projection(model).compute_dtype = torch.bfloat16


def scales_of_eight_bits(model: Any) -> None:
    projection(model).state.SCB.mul_(1.5)


def scales_of_torchao(model: Any) -> None:
    projection(model).weight.scale.mul_(1.5)


def values_of_torchao(model: Any) -> None:
    projection(model).weight.qdata.neg_()


def packed_gguf(model: Any) -> None:
    projection(model).weight[:, 1] ^= 0x04  # the exponent of the first scale of each row


def other_weights_of_torch(model: Any) -> None:
    layer = projection(model)
    layer.set_weight_bias(layer.weight() * 1.5, None)


EDITS: dict[str, tuple[str, Callable[[Any], None]]] = {
    "4 bits, scales": ("bitsandbytes nf4", scales_of_four_bits),
    "4 bits, scales as they are": ("bitsandbytes nf4, scales as they are", scales_of_four_bits),
    "4 bits, packed": ("bitsandbytes nf4", packed_four_bits),
    "8 bits, scales": ("bitsandbytes int8", scales_of_eight_bits),
    "torchao, scales": ("torchao int8", scales_of_torchao),
    "torchao, values": ("torchao int8", values_of_torchao),
    "GGUF, packed": ("GGUF Q8_0", packed_gguf),
    "torch float16": ("torch float16", other_weights_of_torch),
}


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_is_noticed_before_the_next_call(lab: Lab, folder: Path, name: str) -> None:
    kind, edit = EDITS[name]
    model = SERVED[kind](folder)
    cached = lab.wrap(model)
    first = tokens(run(cached, PROMPT))
    before = cached.fingerprint["weights"]
    edit(model)
    second = tokens(run(cached, PROMPT))
    assert cached.usage.cached_tokens == 0
    assert second == tokens(run(model, PROMPT))
    assert second != first
    assert cached.fingerprint["weights"] != before
    assert tokens(run(cached, PROMPT)) == second
    assert cached.usage.cached_tokens == WHOLE


def test_another_compute_type_is_noticed(lab: Lab, folder: Path) -> None:
    model = four_bits(folder)
    cached = lab.wrap(model)
    run(cached, PROMPT)
    before = cached.fingerprint
    type_of_four_bits(model)
    run(cached, PROMPT)
    assert cached.usage.cached_tokens == 0
    assert cached.fingerprint["modules"] != before["modules"]


def test_saving_four_bits_may_change_them(lab: Lab, folder: Path, tmp_path: Path) -> None:
    model = four_bits(folder)
    cached = lab.wrap(model)
    run(cached, PROMPT)
    before = logits(model)
    model.save_pretrained(tmp_path / "saved")  # where bitsandbytes had packed them for the processor, it unpacks them
    changed = not torch.equal(logits(model), before)
    assert tokens(run(cached, PROMPT)) == tokens(run(model, PROMPT))
    assert (cached.usage.cached_tokens == 0) is changed
    run(cached, PROMPT)
    assert cached.usage.cached_tokens == WHOLE


@pytest.mark.multiprocess
def test_found_again_in_a_new_process(lab: Lab, folder: Path) -> None:
    kinds = ["bitsandbytes nf4", "torchao int8"]
    store = lab.store()
    texts = []
    for kind in kinds:
        cached = lab.wrap(SERVED[kind](folder), store)
        texts.append(tokens(run(cached, PROMPT)))
    store.flush()
    code = (
        "import sys; from pathlib import Path; import torch; torch.set_num_threads(1)\n"
        "from kvembed import CachedModel, KVStore\n"
        "from tests.clients.test_quantised import PROMPT, SERVED\n"
        "from tests.model._lab import run, tokens\n"
        "with KVStore(sys.argv[2], max_cpu_bytes=None) as store:\n"
        "    for kind in sys.argv[3:]:\n"
        f"        options = dict(store=store, block_size={BLOCK}, progress=False)\n"
        "        cached = CachedModel(SERVED[kind](Path(sys.argv[1])), **options)\n"
        "        print(tokens(run(cached, PROMPT)), cached.usage.cached_tokens_by_tier)\n"
    )
    command = [sys.executable, "-c", code, str(folder), str(lab.folder / "store"), *kinds]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment_of_a_child())
    assert done.stdout.splitlines()[-2:] == [f"{text} {{'disk': {WHOLE}}}" for text in texts]


@pytest.mark.model
def test_smollm2_in_four_bits(lab: Lab, smollm2: Path) -> None:
    # Large enough for what bitsandbytes rounds to bfloat16 to show in the trial.
    model = four_bits(smollm2)
    prompt = random_ids(2 * 64 + 9)
    before = tokens(run(model, prompt))
    cached = lab.wrap(model, block_size=64, deterministic=True)
    assert cached.support is None
    cold = run_full(cached, prompt)
    assert tokens(cold) == before
    lab.leave_only(cached, "disk")
    assert_equal_bits(run_full(cached, prompt), cold)
    assert cached.usage.cached_tokens_by_tier == {"disk": 2 * 64}
    assert tokens(run(model, prompt)) == before
