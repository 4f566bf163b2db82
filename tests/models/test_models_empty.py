"""A batch of no samples, and models sent to other processes: as the dense model does both."""

import io
import pickle

import pytest
import torch
from helpers.tiny_flux import (
    converted,
    dense_flux,
    flux_inputs,
    mob_flux,
    rel_error,
)
from test_models_contract import lora_state
from test_models_diffusers import run
from test_models_dits import facebook_dit, flux2, lumina2, sd3

from d2m_models import convert, set_top_k

MODELS = {
    "moe": lambda: converted()[1],
    "mob": lambda: mob_flux()[1],
    "adaln": lambda: converted(adaln_dim=16)[1],
}


def outcome(call):
    """(shape of the output) or (error's type, its text)"""
    try:
        return tuple(call().shape)
    except Exception as err:
        return type(err), str(err)


def empty_flux():
    inputs = flux_inputs()
    return {k: v if k.endswith("ids") else v[:0] for k, v in inputs.items()}


@pytest.mark.parametrize("rotary", [True, False])
@pytest.mark.parametrize("name", MODELS)
def test_an_empty_batch_of_flux(name, rotary, monkeypatch):
    if not rotary:  # which diffusers' own cannot do of no samples
        from diffusers.models.transformers import transformer_flux

        monkeypatch.setattr(transformer_flux, "apply_rotary_emb", lambda x, *_, **__: x)
    model, inputs = MODELS[name](), empty_flux()
    want = outcome(lambda: dense_flux()(**inputs).sample)
    assert rotary or want == (0, 12, 16)
    for top_k in (0, 2, "dense"):
        model.set_top_k(top_k)
        for training in (False, True):
            model.train(training)
            assert outcome(lambda: model(**inputs).sample) == want
    if not rotary:
        model.set_top_k(2)
        model.train()
        out = model(**inputs, output_aux=True)
        assert all(r.ids.shape[0] == 0 for r in out.aux.routing.values())
        out.sample.sum().backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        assert grads and not any(g.any() for g in grads)


@pytest.mark.parametrize("family", [sd3, lumina2, flux2, facebook_dit])
def test_an_empty_batch_of_other_models(family):
    model, call, config, _ = family()
    cells = dict(zip(call.__code__.co_freevars, call.__closure__, strict=True))
    for cell in cells.values():
        value = cell.cell_contents
        if isinstance(value, dict):
            cell.cell_contents = {k: _none_of(v) for k, v in value.items()}
        elif isinstance(value, torch.Tensor):
            cell.cell_contents = _none_of(value)
    model.eval()
    want = outcome(lambda: call(model))
    assert want[0] == 0 or family is not facebook_dit  # diffusers' own refuse it
    convert(model, config)
    for top_k in (0, 2, "dense"):
        set_top_k(model, top_k)
        assert outcome(lambda: call(model)) == want


def _none_of(value):
    return value[:0] if value.shape[0] == 2 else value


# --- in another process ---------------------------------------------------------------------


def through_pickle(model):
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("travel", [through_pickle, through_torch_save])
@pytest.mark.parametrize("name", MODELS)
def test_a_model_can_be_pickled(name, travel):
    model = MODELS[name]()
    copy = travel(model)
    assert torch.equal(run(copy), run(model))
    # one whose FFN's LoRA is given, and taken, in the dense order
    state = lora_state(dense_flux(), 0)
    if name == "moe":
        for m in (model, copy):
            m.load_lora_adapter(dict(state), adapter_name="a")
        assert torch.equal(run(copy), run(model))
        stored = travel(copy).state_dict()
        for key in ("lora_A", "lora_B"):
            here = f"single_transformer_blocks.1.proj_mlp.{key}.a.weight"
            given = state[f"transformer.single_transformer_blocks.1.proj_mlp.{key}.weight"]
            assert torch.equal(stored[here], given)


def test_a_converted_model_of_another_family_can_be_pickled():
    model, call, config, _ = sd3()
    convert(model.eval(), config)
    assert torch.equal(call(through_pickle(model)), call(model))


def _in_a_child(model, queue):
    queue.put(run(model).tolist())


@pytest.mark.slow
def test_a_model_can_be_sent_to_a_process_that_is_spawned():
    model = converted()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    child = context.Process(target=_in_a_child, args=(model, queue))
    child.start()
    out = torch.tensor(queue.get(timeout=300))
    child.join()
    assert rel_error(out, run(model)) < 1e-6
