"""`docs/families.md`: its table against the families that are registered, and its examples, run as they stand there."""

import ast
import re
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from omni_runs import build_trainer
from peft import get_peft_model
from PIL import Image
from test_mixed_batches import batched
from test_shared_prefill import GREEDY, generate, repeated
from tiny_models import (
    FAMILIES,
    FamilySpec,
    _block_template,
    _instantiate,
    _text_config,
    build_tiny,
    build_tokenizer,
    save_tiny,
)
from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

from maple_trl.omni.families import base, family_class, family_for, registered_types
from maple_trl.omni.loading import load_model, load_processor
from maple_trl.omni.lora import build_lora_config, linear_modules
from maple_trl.omni.media.loader import MediaLimits, MediaLoader
from maple_trl.omni.prompt import PromptBuilder
from maple_trl.omni.serving import serve_media
from maple_trl.planning import sizes
from maple_trl.rollout.engine_models import ENGINE_MODELS


ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "families.md").read_text(encoding="utf-8")


def table(heading):
    """Rows of the first table behind a heading, cell by cell, the head first."""
    lines = TEXT.partition(f"## {heading}\n")[2].splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[start:]:
        if not line.startswith("|"):
            return rows
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def example(name):
    """The code block whose first line names a file."""
    block = re.search(rf"```(\w+)\n *# {re.escape(name)}\n(.*?)\n *```", TEXT, re.DOTALL)
    lines = block[2].splitlines()
    indent = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    return "\n".join(line[indent:] for line in lines) + "\n"


# The table


def test_the_rows_are_the_registered_families():
    head, _, *rows = table("What works where")
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row[0])]
    assert sorted(named) == registered_types()
    assert all(len(row) == len(head) for row in rows)
    for row in rows:
        for cell in row[1:]:
            assert re.fullmatch(r"yes|no|not tried|(.+ (yes|no|not tried))(, .+ (yes|no|not tried))*", cell), cell


def test_cells_say_what_the_code_says():
    head, _, *rows = table("What works where")
    for row in rows:
        cells = dict(zip(head, row, strict=True))
        for name in re.findall(r"`(\w+)`", row[0]):
            family = family_class(name)
            for column, kind in (("pictures", "image"), ("video", "video"), ("sound", "audio")):
                assert cells[column] == ("yes" if kind in family.placeholders else "no"), (name, column)
            assert cells["sound within video"] == ("yes" if family.interleaves_audio else "no")
            assert (cells["vLLM"] == "no") == (name not in ENGINE_MODELS), name
        first = re.search(r"`(\w+)`", row[0])[1]
        assert cells["plan"] == ("yes" if first in sizes.FAMILIES else "no")


def test_every_column_has_tests_that_there_are():
    _, _, *rows = table("The tests behind the table")
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXT)
    for file, function in named:
        functions = {
            node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)
        }
        assert function in functions, (file, function)
    proven = {column.strip() for row in rows for column in row[0].split(",")} | {"FSDP 2, ZeRO"}
    assert set(table("What works where")[0][1:]) <= proven


# The example


@pytest.fixture
def llava(tmp_path, monkeypatch):
    """A tiny LLaVA, its family from a package as `pip install` leaves it; nothing of it stays."""
    site = tmp_path / "site"
    (site / "my_package").mkdir(parents=True)
    (site / "my_package" / "__init__.py").touch()
    (site / "my_package" / "llava.py").write_text(example("my_package/llava.py"))
    entries = tomllib.loads(example("pyproject.toml"))["project"]["entry-points"]
    assert list(entries) == ["maple_trl.families"]
    lines = [f"[{group}]\n" + "\n".join(f"{k} = {v}" for k, v in names.items()) for group, names in entries.items()]
    info = site / "my_package-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-package\nVersion: 1\n")
    (info / "entry_points.txt").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.setattr(base._FAMILIES, "_found", dict(base._FAMILIES._found))
    spec = FamilySpec(LlavaForConditionalGeneration, LlavaProcessor, 1, 1, 0, None, {"image_token": "<image>"})
    monkeypatch.setitem(FAMILIES, "llava", spec)

    tokenizer = build_tokenizer("llava")
    tokenizer.chat_template = template = _block_template(
        "<image>", None, None, default_system=False, audio_label=False
    )
    side = {"height": 28, "width": 28}
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=side),
        tokenizer=tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, **vision},
        text_config={"model_type": "qwen2", **_text_config(tokenizer, rope_parameters=rope)},
        image_token_id=tokenizer.image_token_id,
    )
    yield _instantiate(LlavaForConditionalGeneration, config, tokenizer, 0), processor
    for name in [name for name in sys.modules if name.split(".")[0] == "my_package"]:
        del sys.modules[name]


@pytest.fixture
def rows(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (3, 40, 28, 3), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
    asked = {"prompt": [{"role": "user", "content": "Which?"}], "solution": "A"}
    return [asked | {"images": files} for files in ([], ["0.png"], ["1.png", "2.png"])]


def test_the_example_serves_what_transformers_computes(llava, rows, tmp_path):
    model, processor = llava
    family = family_for(model, processor)
    assert type(family).__module__ == "my_package.llava"
    builder = PromptBuilder(family, MediaLoader(tmp_path, MediaLimits(min_pixels=100), workers=0))
    prompts = [builder.encode(row) for row in rows]
    assert [prompt.media_tokens.get("image", 0) for prompt in prompts] == [0, 4, 8]
    completions = torch.randint(10, 200, (3, 5), generator=torch.Generator().manual_seed(0))
    inputs, _ = batched(prompts, completions, processor.tokenizer.pad_token_id)
    with torch.no_grad(), serve_media(family, model, prompts):
        together = model(**inputs).logits
    for row, found, completion in zip(rows, together, completions, strict=True):
        alone = native(model, processor, builder, row, completion)
        torch.testing.assert_close(found[-len(alone) :], alone, atol=1e-4, rtol=0)
    assert (together[1, -1] - together[2, -1]).abs().max() > 1e-2
    made, batch = (model, processor, family), repeated(prompts)
    assert torch.equal(generate(*made, batch, True, **GREEDY), generate(*made, batch, False, **GREEDY))
    assert {scope: len(names) for scope, names in linear_modules(model, family).items()} == {
        "vision": 6, "projectors": 2, "llm": 14,
    }  # fmt: skip


def native(model, processor, builder, row, completion):
    content = [{"type": "image"}] * len(row["images"]) + [{"type": "text", "text": "Which?"}]
    text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    pictures = [Image.open(f"{builder.loader.root}/{name}") for name in row["images"]]
    inputs = processor(text=[text], images=pictures or None, return_tensors="pt")
    ids = torch.cat([inputs["input_ids"], completion[None]], dim=1)
    more = {"pixel_values": inputs["pixel_values"]} if pictures else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits[0]


def test_the_example_is_trained(llava, rows, tmp_path):
    model, processor = llava
    options = {
        "min_pixels": 100,
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 1,
        "num_generations": 2,
    }
    given = {"model": model, "processing_class": processor, "shared_prefix": "on", "max_steps": 2}
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer = build_trainer(tmp_path, Dataset.from_list(rows), **given, **options)
    trainer.train()
    moved = {name for name, value in model.named_parameters() if not torch.equal(value, before[name])}
    assert any("vision_tower" in name for name in moved) and any("language_model" in name for name in moved)
    assert {name for name, _ in model.named_parameters() if trainer.family.is_unread(name)}.isdisjoint(moved)


# Adapters of the published Phi-4


@pytest.mark.slow
def test_an_adapter_of_phi_4_is_merged_as_the_page_says(tmp_path):
    published, folder = str(save_tiny("phi4_multimodal", tmp_path / "model")), str(tmp_path / "merged")
    model, processor = build_tiny("phi4_multimodal")
    family = family_for(model, processor)
    adapted = get_peft_model(model, build_lora_config(model, family, vision=False, audio=False, projectors=False, r=2))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    adapted.save_pretrained(f"{published}/speech-lora")
    code = {}
    exec(compile(example("merge_adapter.py"), "merge_adapter.py", "exec"), code)
    code["merge"](published, "speech-lora", folder)
    ids = torch.arange(20, 60)[None]
    with torch.no_grad():
        right, plain, merged = (
            m.eval()(input_ids=ids).logits for m in (adapted, load_model(published), load_model(folder))
        )
    torch.testing.assert_close(merged, right, atol=1e-4, rtol=0)
    assert (plain - right).abs().max() > 1e-2
    assert load_processor(folder).chat_template == processor.chat_template
