"""Independent witnesses: do vlm_query.py and offline_vlm.py speak the wire formats as others understand them?

Our client and our stand-in could share a misunderstanding. So the official SDKs of OpenAI, Anthropic and Google talk to
the stand-in under strict validation, and must send the JSON that we send and read the text that we read; and a server
we did not write, `transformers serve`, must see both pictures that our client sends, in order. And a tiny CLIP must be
priced as `transformers` itself does.

    python -m venv witness && witness/bin/pip install -r tests/requirements-witness.txt
    witness/bin/python -m pytest tests/test_witness.py
"""
import base64
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import requests

import vlm_query
from support.offline_vlm import SIGHT, OfflineVLM
from vlm_query import VLM

CURE = "this witness is missing: pip install -r tests/requirements-witness.txt, in an environment of its own"
KEY = "a-key"
DARK, LIGHT = np.full((32, 32, 3), 9, np.uint8), np.full((32, 32, 3), 200, np.uint8)
QUESTION = ["Image 1:", DARK, "Image 2:", LIGHT, (vlm_query.ANALYSE + vlm_query.ANSWER).format(goal=SIGHT)]


def png(image):
    return base64.b64decode(vlm_query.png_base64(image))


def data_url(image):
    return "data:image/png;base64," + vlm_query.png_base64(image)


def by_openai_chat(url):
    openai = pytest.importorskip("openai", reason=CURE)
    client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, _strict_response_validation=True)
    content = [{"type": "text", "text": part} if isinstance(part, str) else
               {"type": "image_url", "image_url": {"url": data_url(part)}} for part in QUESTION]
    answer = client.chat.completions.create(model="m", messages=[{"role": "user", "content": content}])
    message = answer.choices[0].message
    return message.content or message.refusal, answer.usage.prompt_tokens, answer.usage.completion_tokens


def by_anthropic(url):
    anthropic = pytest.importorskip("anthropic", reason=CURE)
    client = anthropic.Anthropic(base_url=url.removesuffix("/v1"), api_key=KEY, max_retries=0,
                                 _strict_response_validation=True)
    content = [{"type": "text", "text": part} if isinstance(part, str) else
               {"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                            "data": vlm_query.png_base64(part)}} for part in QUESTION]
    answer = client.messages.create(model="m", max_tokens=8192, messages=[{"role": "user", "content": content}])
    return answer.content[0].text, answer.usage.input_tokens, answer.usage.output_tokens


def by_google(url):
    genai = pytest.importorskip("google.genai", reason=CURE)
    root = genai.types.HttpOptions(base_url=url.removesuffix("/v1"), api_version="v1")
    client = genai.Client(api_key=KEY, http_options=root)
    parts = [genai.types.Part.from_text(text=part) if isinstance(part, str) else
             genai.types.Part.from_bytes(data=png(part), mime_type="image/png") for part in QUESTION]
    answer = client.models.generate_content(model="m", contents=[genai.types.Content(role="user", parts=parts)])
    return answer.text, answer.usage_metadata.prompt_token_count, answer.usage_metadata.candidates_token_count


def plain(value):
    """Google's SDK writes inlineData and URL-safe base64, both legal; we write what its curl examples write."""
    if isinstance(value, dict):
        names = {"inlineData": "inline_data", "mimeType": "mime_type"}
        return {names.get(name, name): plain(v).replace("-", "+").replace("_", "/") if name == "data" else plain(v)
                for name, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list) else value


WITNESSES = {"openai/m": by_openai_chat, "anthropic/m": by_anthropic, "gemini/m": by_google}


@pytest.mark.parametrize("provider", WITNESSES)
def test_the_sdk_sends_the_json_that_we_send_and_reads_the_text_that_we_read(provider):
    """Path, key and body must be equal, and so must text and token counts of the answer."""
    server = OfflineVLM(key=KEY)
    with server as url:
        theirs = WITNESSES[provider](url)
        path, headers, raw = server.last
        ours = VLM(provider, url=url, key=KEY).ask(QUESTION)
        assert server.last[0] == path and json.loads(server.last[2]) == plain(json.loads(raw))
    assert theirs == (ours.text, ours.tokens_in, ours.tokens_out)
    assert vlm_query.parse_label(theirs[0]) == 1 and ours.end == "complete"


UNSURE = [*QUESTION[:3], DARK + 11, QUESTION[4]]  # little brighter: the stand-in is not quite sure


def probabilities_by_openai(url):
    openai = pytest.importorskip("openai", reason=CURE)
    client = openai.OpenAI(base_url=url, api_key=KEY, max_retries=0, _strict_response_validation=True)
    content = [{"type": "text", "text": part} if isinstance(part, str) else
               {"type": "image_url", "image_url": {"url": data_url(part)}} for part in UNSURE]
    answer = client.chat.completions.create(model="m", messages=[{"role": "user", "content": content}],
                                            logprobs=True, top_logprobs=5)
    last = answer.choices[0].logprobs.content[-1]
    return last.token, {each.token: each.logprob for each in last.top_logprobs}


def probabilities_by_google(url):
    genai = pytest.importorskip("google.genai", reason=CURE)
    root = genai.types.HttpOptions(base_url=url.removesuffix("/v1"), api_version="v1")
    parts = [genai.types.Part.from_text(text=part) if isinstance(part, str) else
             genai.types.Part.from_bytes(data=png(part), mime_type="image/png") for part in UNSURE]
    client = genai.Client(api_key=KEY, http_options=root)
    answer = client.models.generate_content(
        model="m", contents=[genai.types.Content(role="user", parts=parts)],
        config=genai.types.GenerateContentConfig(response_logprobs=True, logprobs=5))
    found = answer.candidates[0].logprobs_result
    return found.chosen_candidates[-1].token, {each.token: each.log_probability for each in found.top_candidates[-1].candidates}


@pytest.mark.parametrize("provider, witness", [("openai/m", probabilities_by_openai), ("gemini/m", probabilities_by_google)])
def test_the_sdk_asks_for_probabilities_as_we_do_and_reads_those_that_we_read(provider, witness):
    """Of tokens that may stand where the label is; the body must be equal as well."""
    server = OfflineVLM(key=KEY)
    with server as url:
        token, others = witness(url)
        raw = server.last[2]
        ours = VLM(provider, url=url, key=KEY, logprobs=True).ask(UNSURE)
        assert json.loads(server.last[2]) == plain(json.loads(raw))
    assert token == "1" and sorted(others) == ["0", "1"]
    p = {token: np.exp(logprob) for token, logprob in others.items()}
    assert 0.7 < ours.p_second < 0.9 and ours.p_second == pytest.approx(p["1"] / (p["0"] + p["1"]), abs=1e-4)


@pytest.mark.parametrize("fault", ["refusal", "cut off"])
@pytest.mark.parametrize("provider", ["openai/m", "anthropic/m"])
def test_the_sdk_accepts_the_stand_ins_refusals_and_cut_off_answers(provider, fault):
    """Under strict validation they must read the words that we read."""
    with OfflineVLM(faults=fault) as url:
        text = WITNESSES[provider](url)[0]
    with OfflineVLM(faults=fault) as url:
        reply = VLM(provider, url=url, key=KEY).ask(QUESTION)
    assert reply.text == text and reply.end == {"refusal": "refused", "cut off": "cut off"}[fault]


@pytest.mark.parametrize("fault, name", [("429", "RateLimitError"), ("wrong key", "AuthenticationError"),
                                         ("unknown model", "NotFoundError"), ("500", "InternalServerError"),
                                         ("invalid JSON", "JSONDecodeError"), ("drop before", "APIConnectionError")])
@pytest.mark.parametrize("provider", ["openai/m", "anthropic/m"])
def test_the_sdk_knows_the_stand_ins_faults_by_name(provider, fault, name):
    """Each fault must be the exception that the SDK's users know it by."""
    with OfflineVLM(faults=fault) as url, pytest.raises(Exception) as caught:
        WITNESSES[provider](url)
    assert type(caught.value).__name__.endswith(name)


# ---- a server we did not write, with a tiny VLM of random weights ----

def make_tiny_vlm(folder):
    """LLaVA with one layer of each kind, random weights, bytes for letters, 28 x 28 pixels. Nothing is downloaded."""
    import tokenizers
    import torch
    import transformers
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil  # needs no torchvision

    words = ["<unk>", "<s>", "</s>", "<pad>", "<image>", *sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())]
    letters = tokenizers.Tokenizer(tokenizers.models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[]))
    letters.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    letters.decoder = tokenizers.decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=letters, bos_token="<s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"})
    pictures = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    template = ("{% for m in messages %}{% for c in m['content'] %}{% if c['type'] == 'image' %}<image>"
                "{% elif c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}")
    processor = transformers.LlavaProcessor(
        image_processor=pictures, tokenizer=tokenizer, patch_size=14, num_additional_image_tokens=1,
        vision_feature_select_strategy="default", image_token="<image>", chat_template=template)
    small = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(image_size=28, patch_size=14, projection_dim=16, **small),
        text_config=transformers.LlamaConfig(vocab_size=len(words), bos_token_id=1, eos_token_id=2, pad_token_id=3,
                                             num_key_value_heads=2, **small),
        image_token_index=4, vision_feature_select_strategy="default", vision_feature_layer=-1)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config).eval()
    for weight in model.parameters():
        if weight.ndim > 1:
            weight.data.normal_(0, 0.7)  # the usual small weights would write the same letter whatever they see
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor


def says_directly(model, processor, images, letters):
    """What the model writes about the pictures without any server or client between."""
    import torch

    text = "Image 1:<image>Image 2:<image>Which one?"
    inputs = processor(images=[image for image in images], text=text, return_tensors="pt")
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=letters, do_sample=False)
    return processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """-> (name for our client, url of `transformers serve`, model, processor)"""
    pytest.importorskip("fastapi", reason=CURE)
    pytest.importorskip("transformers", reason=CURE)
    folder = str(tmp_path_factory.mktemp("tiny"))
    model, processor = make_tiny_vlm(folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [str(Path(sys.executable).with_name("transformers")), "serve", folder, "--host", "127.0.0.1",
               "--port", str(port), "--device", "cpu"]
    with open(Path(folder) / "log.txt", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    try:
        for _ in range(240):
            try:
                if requests.get(f"http://127.0.0.1:{port}/health", timeout=1).ok:
                    break
            except requests.RequestException:
                time.sleep(0.5)
            assert process.poll() is None, (Path(folder) / "log.txt").read_text()[-2000:]
        yield f"local/{folder}", f"http://127.0.0.1:{port}/v1", model, processor
    finally:
        process.terminate()
        process.wait()


def test_a_real_server_sees_both_pictures_in_order_and_we_read_its_answer(tiny):
    """Through our client the model must write what it writes directly, and something else for swapped pictures."""
    name, url, model, processor = tiny
    vlm = VLM(name, url=url, extra={"max_tokens": 24})
    texts = {}
    for case, images in {"in order": (DARK, LIGHT), "swapped": (LIGHT, DARK), "first twice": (DARK, DARK)}.items():
        reply = vlm.ask(["Image 1:", images[0], "Image 2:", images[1], "Which one?"])
        assert reply.text == says_directly(model, processor, images, 24) and reply.end == "cut off"
        texts[case] = reply.text
    assert len(set(texts.values())) == 3 and reply.tokens_out == 24


def test_a_model_that_cannot_see_is_found_out_before_it_is_trusted(tiny):
    """Random weights must not pass the sight check."""
    with pytest.raises(vlm_query.VLMError, match="sight check: cut off"):
        VLM(tiny[0], url=tiny[1], extra={"max_tokens": 24}).check_sight()


# ---- CLIP as `transformers` has it, with a tiny one of random weights ----

def make_tiny_clip(folder):
    """A CLIP with random weights and a vocabulary of a few words, saved like a real one -> the folder."""
    transformers = pytest.importorskip("transformers", reason=CURE)
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "<start>", "<end>", "<unk>", "the", "pole", "is", "upright", "a"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 1), ("<end>", 2)])
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<end>",
                                         unk_token="<unk>").save_pretrained(folder)
    size = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, projection_dim=8)
    text = dict(size, vocab_size=len(words), max_position_embeddings=12, bos_token_id=1, eos_token_id=2, pad_token_id=0)
    torch.manual_seed(0)
    transformers.CLIPModel(transformers.CLIPConfig(
        text_config=text, vision_config=dict(size, image_size=32, patch_size=8), projection_dim=8)
    ).save_pretrained(folder)
    return folder


def test_a_tiny_random_clip_gives_the_rewards_that_transformers_gives(tmp_path):
    """ClipReward must be the model's own cosine, the same in any batch size, and the regularised one with alpha."""
    folder = str(make_tiny_clip(tmp_path))
    import torch
    import transformers

    from support import baselines

    images = np.random.default_rng(0).integers(0, 255, (5, 40, 60, 3), np.uint8)
    reward = baselines.ClipReward("the pole is upright", model=folder)
    found = reward.predict(images)
    tokens = transformers.AutoTokenizer.from_pretrained(folder)("the pole is upright", return_tensors="pt")
    with torch.no_grad():
        model = transformers.CLIPModel.from_pretrained(folder).eval()
        out = model(input_ids=tokens["input_ids"], pixel_values=baselines.preprocess(images, 32))
    assert found.shape == (5,) and found.dtype == np.float32 and len(set(found.tolist())) == 5
    assert np.allclose(found, (out.image_embeds @ out.text_embeds[0]).numpy(), atol=1e-5)
    assert np.allclose(reward.embed_images(images, chunk=2) @ reward.goal, found, atol=1e-5)
    assert reward.predict(images[:0]).shape == (0,)
    regularised = baselines.ClipReward("the pole is upright", "a pole", alpha=0.5, model=folder)
    expected = baselines.goal_baseline_reward(out.image_embeds, regularised.goal, regularised.baseline, 0.5)
    assert np.allclose(regularised.predict(images), expected.numpy(), atol=1e-5)


def no_tokenizer(folder):
    for file in folder.glob("token*"):
        file.unlink()


def no_projections(folder):
    from safetensors import torch as safetensors

    weights = safetensors.load_file(folder / "model.safetensors")
    safetensors.save_file({name: weight for name, weight in weights.items() if "projection" not in name},
                          folder / "model.safetensors", {"format": "pt"})


def cut_short(folder):
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:1000])


def other_words(folder):
    (folder / "tokenizer.json").write_text("{}")


@pytest.mark.parametrize("damage", [no_tokenizer, no_projections, cut_short, other_words])
def test_a_clip_that_is_not_whole_is_refused_in_one_line(tmp_path, damage):
    """transformers makes up what a folder lacks, at random: such a CLIP must not price a single picture."""
    make_tiny_clip(tmp_path)
    damage(tmp_path)
    from support import baselines

    with pytest.raises(baselines.ClipError, match="no CLIP model") as error:
        baselines.load(str(tmp_path))
    assert "\n" not in str(error.value)


def test_clip_prices_pictures_from_the_command_line(tmp_path, monkeypatch, capsys):
    """A line for each picture, the same as in a batch; a file that is no picture is one line and exit status 2."""
    pytest.importorskip("transformers", reason=CURE)
    from support import baselines

    folder, load = str(make_tiny_clip(tmp_path)), baselines.load
    monkeypatch.setattr(baselines, "load", lambda model: load(folder))
    (tmp_path / "dark.png").write_bytes(png(DARK))
    (tmp_path / "words.png").write_text("no picture")
    assert baselines.main(["the pole is upright", str(tmp_path / "dark.png")]) == 0
    expected = baselines.ClipReward("the pole is upright").predict(DARK[None])[0]
    assert capsys.readouterr().out.split()[0] == f"{expected:.4f}"
    assert baselines.main(["the pole is upright", str(tmp_path / "words.png")]) == 2
    assert capsys.readouterr().err.startswith("baselines.py: ")
