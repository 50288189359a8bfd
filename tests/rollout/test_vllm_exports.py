"""vLLM loads a full Omni model that `maple-trl export` wrote, by nothing but its folder, and answers as transformers does."""

import pytest
import torch
from media_files import copy_small_set, picture, tone
from PIL import Image
from transformers import AutoProcessor, Qwen2_5OmniForConditionalGeneration
from vllm_runs import BOUND, build, save_wide

from maple_trl import OmniGRPOTrainer, cli


vllm = pytest.importorskip("vllm", reason="make test-vllm runs these where vLLM is")
pytestmark = [pytest.mark.slow, pytest.mark.vllm]

TOKENS, RATE = 8, 16000
PICTURE, SOUND = Image.fromarray(picture(3, 84, 112)), tone(1.0, RATE)[0]
PROMPTS = (("image",), ("audio",), ("image", "audio"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A full Omni model with its talker and vocoder, and what was exported of a run that trained its Thinker."""
    folder = tmp_path_factory.mktemp("exports")
    original = save_wide("qwen2_5_omni", folder / "original", full=True)
    torch.save({"Chelsie": {"bos_token": 1, "cond": torch.ones(2)}}, folder / "original/spk_dict.pt")
    rows = copy_small_set(folder / "clips").select(range(0, 28, 4))
    options = {"output_dir": str(folder / "run"), "use_vllm": False, "save_strategy": "no", "max_steps": 2}
    trainer = build("grpo", folder / "clips", rows, model=original, trainer=OmniGRPOTrainer, **options)
    trainer.train()
    trainer.save_model()
    words = ["export", str(folder / "run"), str(folder / "full"), "--parts", "full", "--original", original]
    assert cli.main(words) == 0
    return folder


def text_of(processor, kinds):
    content = [{"type": kind, kind: "-"} for kind in kinds] + [{"type": "text", "text": "What is it?"}]
    message = {"role": "user", "content": content}
    return processor.apply_chat_template([message], tokenize=False, add_generation_prompt=True)


@torch.no_grad()
def by_transformers(folder):
    """For each prompt the tokens of greedy decoding and their log-probabilities, by the class that speaks."""
    processor = AutoProcessor.from_pretrained(folder)
    model = Qwen2_5OmniForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).thinker.eval()
    answers = []
    for kinds in PROMPTS:
        given = {"images": [PICTURE]} if "image" in kinds else {}
        given |= {"audio": [SOUND]} if "audio" in kinds else {}
        inputs = processor(text=[text_of(processor, kinds)], return_tensors="pt", **given)
        length = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS}
        found = model.generate(**inputs, **length, do_sample=False, output_logits=True, return_dict_in_generate=True)
        tokens = found.sequences[0, inputs["input_ids"].shape[1] :]
        logps = torch.cat(found.logits).float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        answers.append((tokens.tolist(), logps))
    return answers


def by_vllm(folder):
    """The same, by vLLM from the same folder."""
    processor = AutoProcessor.from_pretrained(folder)
    engine = vllm.LLM(model=str(folder), dtype="float32", max_model_len=1024, enforce_eager=True, max_num_seqs=4)
    media = {"image": PICTURE, "audio": (SOUND, RATE)}
    prompts = [
        {"prompt": text_of(processor, kinds), "multi_modal_data": {kind: media[kind] for kind in kinds}}
        for kinds in PROMPTS
    ]
    options = vllm.SamplingParams(temperature=0, max_tokens=TOKENS, min_tokens=TOKENS, logprobs=0)
    try:
        answers = [output.outputs[0] for output in engine.generate(prompts, options)]
    finally:
        engine.llm_engine.engine_core.shutdown()
    return [
        (
            list(answer.token_ids),
            torch.tensor([step[token].logprob for step, token in zip(answer.logprobs, answer.token_ids, strict=True)]),
        )
        for answer in answers
    ]


def test_vllm_answers_as_transformers(folders):
    expected, untrained = by_transformers(folders / "full"), by_transformers(folders / "original")
    found = by_vllm(folders / "full")
    for (tokens, logps), (own, own_logps), (former, _) in zip(expected, found, untrained, strict=True):
        assert own == tokens and (own_logps - logps).abs().max() < BOUND
        assert own != former  # the control: another Thinker would have been seen
    assert len({tuple(tokens) for tokens, _ in found}) == len(PROMPTS)
