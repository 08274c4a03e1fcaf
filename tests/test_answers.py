"""What a VLM says, and images from files: no answer is read as its opposite, no good one is thrown away."""
import json
import struct
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from vlm_query import VLM, VLMError, load_image, parse_label, parse_score


@pytest.mark.parametrize("text", [
    "Image 2 is worse.\n1", "Image 1 is farther from the goal.\n0", "Image 2 looks much further away.\n1", "Neither is closer.\n1",
    # the first image by other names, in other languages, with a heading or a tag
    "Frame 1 is closer", "Photo 1 is closer.", "Option 1", "Img 1", "Bild 1 ist näher am Ziel.", "图像 1 更接近目标。",
    "La imagen 1 está más cerca.", "画像1", "第1张", "изображение 1", "1st image", "the first", "picture #1", "#1", "(1) is closer",
    "1 is better", "A", "left", "①", "No. 1", "Number 1", "№1", "1er", "Image_1", "Frame\u00a01", "Bild\u200b1", "[Image 1]",
    "The closer image is 1.", "The closer image is:\n1", "The closer image is\n**1**", "Closer image\n1", "### Closer image\n\n1",
    "**Closer image**\n1", "The answer is: Image\n1", "Which image is closer?\n1", "Closer: 1", "Choice: 1", "Answer: option 1", "Answer: Image **1**",
    "<choice>1</choice>", "<image>\n1\n</image>", '{"closer_image": 1}', "Image 1 is closer: 1", "Image 1 is closer.\n1",
    "Image 2 is worse: 1", "Image 2 is not closer: 1", "If Image 2 is closer: 1",
    # 0, and a 1 that means something else
    "0\nConfidence: 1", "0\n\nConfidence:\n1", "0\n1", "0\n**1**", "0\n[1]", "0\n(1 = Image 2 is closer)", "1 = Image 2", "0 [1]",
    "1: Image 2 is closer", "**0**\n\nNote: 1 would mean Image 2.", '{"label": 0,\n "confidence": 1}', '{"label": 0, "confidence": 1}',
    "0\n[1] https://example.org", "The answer is zero, not 1.", "not 1", "Answer ≠ 1", "!1", "~~1~~", "0\n- [ ] 1", "[x] 0\n[ ] 1",
    "Label 0: yes\nLabel 1: no", "Image 1: 0\nImage 2: 1", "<answer>0</answer>\n<confidence>1</confidence>", "Answer: 0\nLabel: 1",
    "<answer>\n0\n</answer>\n<confidence>\n1\n</confidence>", "Score: 1", "2\n1",
    # no label at all
    "1%", "1 %", "10% sure: 1", "1/1", "1?", "±1", "+1", "1️⃣", "¹", "1e0", "0.0", "- 1", "Answer - 1", "0 → 1", "&minus;1", "0 or 1\n</s>",
    "Image 1.\n</answer>", "<thinking>1", "◁think▷1", "[THINK]1", "<|begin_of_thought|>1", "<reasoning>\n1",
    # a verdict on one image, then the label of the other
    "Image 1 is closer to the goal because the drawer is open.\n1", "Overall, Image 1 is closer to the goal.\n\n1", "Image 1 appears closer to the goal.\n1",
    "Image 1 is closer to opening the drawer.\n1", "The closer image is Image 1.\n1", "Closer image: Image 1\n\n1", "Closer image: 1\n1",
    "The first image is nearer to the goal.\n1", "In conclusion, Image 2 is closer to the goal.\n0", "Image 1 is the closer one!\n1", "Image 1: closest.\n1",
    "Image 2 is closer.\nNo: Image 1 is clearly better.\n1", '{"reason": "Image 1 is closer.",\n "answer": 1}', "Image 1 wins\n\n1",
    # JSON and tags that name the winner
    '{"winner": "Image 1",\n "answer": 1}', '{\n "closer": "Image 1",\n "label": 1\n}', '{"image": 1,\n"answer": 1}', '{"answer": "Image 1 is closer",\n "number": 1}',
    "<answer>Image 1</answer>\n<number>1</number>", 'label: "Image 1"\nnumber: 1',
    # headings of any length, and with any end but a full stop
    "The number of the image that is closer to the goal\n1", "The image closer to the goal of opening the drawer\n1",
    "Which one is closer to the goal, Image 1 or Image 2\n1", "Which one is closer: 1 or 2\n1", "- Closer image\n1", "Closer image (1 or 2)\n1", "Closer image…\n1",
    "Closer image...\n1", "Closer image!\n1", "Winner ->\n1", "Winner –\n1", "La imagen más cercana al objetivo es la\n1", "### 3. Closer image.\n1", "Image 1\n1",
    "It is definitely not the case that the answer would be\n1", "anything other than 0 or\n1", "Closer\n---\n1", "Number of\n\nthe closer image is\n1",
    # a minus sign on a line of its own, no confidence, crossed out
    "-\n1", "Answer: -\n1", "–\n1", "**-**\n1", "50% sure: 1", "I'm 50% certain: 1", "~~0~~\n1",
    # thoughts
    "<|START_THINKING|>1<|END_THINKING|>", "<|START_THINKING|>1", "<|channel>thought\n1", "<unused94>thought\n1", "<|thinking|>1", "<!--\n1\n-->",
    # a -1 that is no answer
    "The answer is not: -1", "Difference in angle: -1", "Options: 0, 1 or: -1", "Image 2 is closer.\n-1",
    # good answers of a kind, turned round
    "1 (Image 1)", "0 (Image 2)", "Answer: 1 (Image 1)", "-1 (Image 2)", "### Closer image:\n**1**", "Conclusion: Image 1", "Image 1 appears closer to the goal: 1",
    "Therefore, the first image is closer to the goal, so the answer is 1.", "1<|im_end|>\n<|im_start|>assistant\n0", "0\n\n### Human: 1"])
def test_what_could_be_the_opposite_is_unreadable(text):
    """A guess would teach the opposite in silence; an unreadable answer costs one question."""
    assert parse_label(text) is None


@pytest.mark.parametrize("text, label", [
    ("Image 1 is farther from the goal.\n1", 1), ("Image 2 is closer. Image 1 is worse.\n1", 1),
    ("1. In Image 1, the drawer is shut\n2. In Image 2, the drawer is open\n3. Image 2 is nearer to the goal\n\n1", 1),
    ("Image 1 is nearer to the goal of standing upright\n0", 0),
    ("Answer: 1", 1), ("Label: 0", 0), ("**Final answer:** 1", 1), ("The final answer is: **0**.", 0), ("Therefore, the answer is 1.", 1),
    ("Antwort: 1", 1), ("Réponse : 1", 1), ("答案: 1", 1), ("答案：**0**", 0), ("90% sure: 0", 0), ("I'm 95% certain: 1", 1), ("Label = 1", 1),
    ("Image 2 is better: **1**", 1), ("Image 2 is closer to the goal, so the answer is 1.", 1), ("Image 1 is closer than Image 2: 0", 0),
    ("1 (Image 2 is closer to the goal)", 1), ("The answer is 0 because Image 1 is closer.", 0), ("Image 2 is closer.\n1", 1),
    ('{"label": 1}', 1), ('```json\n{\n  "answer": "0"\n}\n```', 0), ("<answer>1</answer>", 1), ("So:\n<answer>\n1\n</answer>", 1),
    ("<final_answer>0</final_answer>", 0), ("0\n<|im_end|>", 0), ("1</s>", 1), ("1<|eot_id|>", 1), ("1<end_of_turn>", 1), ("1\n<eos>", 1),
    ("0 [/INST]", 0), ("0<｜end▁of▁sentence｜>", 0), ("<|begin_of_box|>1<|end_of_box|>", 1), ("```1```", 1), ("1)", 1), ("[0]", 0),
    ("$\\boxed{\\text{1}}$", 1), ("\\(1\\)", 1), ("'1'", 1), ("\ufeff1\u200b", 1), ("１", 1), ("（０）", 0), ("١", 1), ("## Answer\n1", 1),
    ("Final answer:\n\n1", 1), ("<thinking>0</thinking>\n1", 1), ("<reasoning>1\n</reasoning>0", 0), ("◁think▷1◁/think▷0", 0),
    ("<|begin_of_thought|>1<|end_of_thought|>0", 0), ("[THINK]1[/THINK]0", 0), ("<seed:think>1</seed:think>0", 0),
    ("1. Dark.\n2. Bright.\n3. Image 2 is closer to the goal.\n\n1", 1), ("Image 1: angle: -1\nImage 2: angle: 0\n0", 0),
    ("Certainty: 0.9\n1", 1), ("Answer: 1\n\n1", 1),
    ("minus 1", -1), ("Answer: negative 1", -1), ("-**1**", -1), ("-`1`", -1), ("-\u200b1", -1), ("➖1", -1), ("⁻1", -1), ("－１", -1),
    ("—1", -1), ("﹣1", -1), ("-1.", -1), ("\\boxed{-1}", -1), ("I cannot tell: -1", -1), ("Neither image 1 nor image 2 is closer: -1", -1),
    # headings in Markdown
    ("### Final Answer:\n**1**", 1), ("### Answer:\n1", 1), ("#### Label:\n0", 0), ("### Final Answer:\n\n\\[\n\\boxed{1}\n\\]", 1), ("### Final answer\n\n---\n\n0", 0),
    ("### Analysis\n\n1. **Image 1**: The pole leans.\n2. **Image 2**: It is upright.\n3. Image 2 is nearer.\n\n1", 1),
    # other words for the answer
    ("**Conclusion:**\n\n1", 1), ("Conclusion: 1", 1), ("Decision: 1", 1), ("Verdict: 1", 1), ("<CONCLUSION>1</CONCLUSION>", 1), ("Final line: 1", 1),
    ("Here is the single number:\n1", 1), ("Here's my final answer:\n1", 1), ("The single number is 1.", 1), ("In conclusion, the answer is 1.", 1),
    ("Based on the notes, the answer is 1.", 1), ("答案是：1", 1), ("最终答案：1", 1), ("Die Antwort ist 1.", 1), ("La respuesta es 1.", 1), ("La réponse est 1.", 1), ("정답: 1", 1),
    # a number and an image that agree
    ("1 (Image 2)", 1), ("0 (Image 1)", 0), ("Answer: 1 (Image 2)", 1), ("**0** (Image 1)", 0), ("Image 2 appears closer to the goal: 1", 1),
    ("Therefore, the second image is closer to the goal, so the answer is 1.", 1), ("Overall, Image 2 is closer to the goal\n\n1", 1), ("Closer image: Image 2\n\n1", 1),
    ("At first sight Image 1 looks closer.\nBut no, Image 2 is nearer to an open drawer.\n1", 1), ("Image 2 is closer. In Image 1 the pole is closer to falling.\n1", 1),
    ('{"reason": "Image 2 is closer.",\n "answer": 1}', 1), ("- Image 1: closed\n- Image 2: open\n\n1", 1),
    # -1 with its reason
    ("-1 (it cannot be told)", -1), ("-1 because both are the same", -1), ("There's no difference, so the answer is -1.", -1), ("Both look alike\n-1", -1),
    # what a server adds, and the digit of an emoji
    ("1<|im_end|>\n<|im_start|>assistant\n", 1), ("1\n\n### Human:", 1), ("1\ufe0f", 1), ("51% sure: 1", 1), ("<|START_THINKING|>0<|END_THINKING|>1", 1),
    ("<|channel>thought\n0<channel|>1", 1), ("<unused94>thought\n0<unused95>1", 1), ("They differ.\n1", 1)])
def test_good_answers_as_models_write_them_are_read(text, label):
    """Each was paid for, and half a batch of unreadable ones stops the run."""
    assert parse_label(text) == label


@pytest.mark.parametrize("text, score", [
    ("0.7", 0.7), ("**Score:** 0.85.", 0.85), ("The score is 1", 1), ('{"score": 0.3}', 0.3), ("<score>0</score>", 0), ("Rating: 0.3</s>", 0.3),
    ("70%", None), ("0.7%", None), ("0.7/1", None), ("7/10", None), ("0.7\nConfidence: 0.9", None), ("0.7\n0.9", None),
    ("Confidence:\n0.9", None), ("\u22120.5", None), ("minus 1", None), ("1.5", None), ("0 (worst) to 1 (best): 0.7", None),
    ("### Score:\n0.7", 0.7), ("The drawer is half open.\n0.5", 0.5), ("Distance from the goal as a number\n0.9", None), ("Image 2 is closer: 1", None)])
def test_a_score_is_read_by_the_same_rule(text, score):
    """Percent, fractions and the confidence of an answer are no scores."""
    assert parse_score(text) == score


def answered(message, **choice):
    """What a VLM makes of an OpenAI-compatible answer -> Reply, and whether it was kept."""
    vlm = VLM("local/m", url="http://127.0.0.1:1/v1")
    return vlm._read(json.dumps({"choices": [{"message": message, **choice}], "usage": {"prompt_tokens": 5}}))


@pytest.mark.parametrize("choice", [{}, *({"finish_reason": reason} for reason in (
    None, "", "stop", "STOP", "eos", "EOS", "eos_token", "stop_sequence", "end_turn",
    "<|im_end|>", "done", "end", "finished", "FINISH_REASON_STOP"))])
def test_a_whole_answer_is_whole_whatever_its_server_calls_that(choice):
    """Together, TGI, KoboldCpp and others have words of their own, or none."""
    assert answered({"content": "0"}, **choice) == ("0", "complete", 5, 0, None)
    assert answered({"content": ""}, **choice)[1] == "empty"


@pytest.mark.parametrize("reason, end", [("length", "cut off"), ("MAX_TOKENS", "cut off"), ("max_new_tokens", "cut off"), ("tool_calls", "cut off"),
                                         ("function_call", "cut off"), ("content_filter", "refused"), ("abort", "failed"),
                                         ("error", "failed"), ("insufficient_system_resource", "failed"), ({"type": "stop"}, "failed")])
def test_an_answer_that_is_not_whole_stays_refused(reason, end):
    """Text that was cut off may end with any number."""
    assert answered({"content": "0"}, finish_reason=reason)[1] == end


def test_text_that_comes_in_parts_is_joined_without_the_thoughts():
    """Mistral's reasoning models answer so; a thought must never be read as the answer."""
    thought = {"type": "thinking", "thinking": [{"type": "text", "text": "0"}]}
    parts = [thought, {"type": "text", "text": "They differ.\n"}, {"type": "reasoning", "text": "0"}, {"type": "text", "text": "1"}]
    assert answered({"content": parts}, finish_reason="stop")[:2] == ("They differ.\n1", "complete")
    text, end, *_ = answered({"content": [thought]}, finish_reason="stop")
    assert text == "" and end.startswith("empty (all of the text is in thinking")
    for odd in ([], ["1"], [{}], [{"type": "text", "text": None}], {"type": "text", "text": "1"}, 1):
        assert answered({"content": odd}, finish_reason="stop")[:2] == ("", "empty")


@pytest.mark.parametrize("place", ["reasoning_content", "reasoning"])
def test_an_answer_in_the_place_of_thoughts_is_named_and_not_kept(tmp_path, place):
    """The user must learn where the text went; with the server mended, the question is asked again."""
    body = {"choices": [{"message": {"content": None, place: "1"}, "finish_reason": "stop"}]}
    vlm = VLM("local/m", url="http://127.0.0.1:1/v1", cache=tmp_path)
    vlm._post = lambda *_: (200, {}, json.dumps(body))
    reply = vlm.ask(["hi"])
    assert reply.text == "" and reply.end.startswith(f"empty (all of the text is in {place}: ")
    assert not list(tmp_path.glob("*.json"))
    assert answered({"content": "", place: "1"}, finish_reason="length")[1].startswith(f"cut off (all of the text is in {place}")
    assert answered({"content": "0", place: "1"}, finish_reason="stop")[:2] == ("0", "complete")


@pytest.mark.parametrize("provider, body", [
    ("local/m", {"choices": [{"message": {"content": "\ud83d\n1"}, "finish_reason": "stop"}]}),
    ("gemini/m", {"candidates": [{"content": {"parts": [{"text": "\ud83d\n1"}]}, "finishReason": "STOP"}]}),
    ("anthropic/m", {"content": [{"type": "text", "text": "\ud83d\n1"}], "stop_reason": "end_turn"})])
def test_half_an_emoji_can_be_printed_and_written(provider, body):
    """A lone surrogate is legal in JSON; it must become a question mark where the text is read."""
    text, end, *_ = VLM(provider, url="http://127.0.0.1:1/v1", key="k")._read(json.dumps(body))
    assert (text, end) == ("?\n1", "complete") and text.encode()


def saved(path, image, **settings):
    image.save(path, **settings)
    return load_image(path)


GREY16 = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (8, 1))


@pytest.mark.parametrize("name, image", [
    ("a.png", Image.fromarray(GREY16)), ("a.tif", Image.fromarray(GREY16)), ("b.tif", Image.frombytes("I;16B", (256, 8), GREY16.astype(">u2").tobytes())),
    ("c.tif", Image.fromarray(GREY16.astype(np.int32))), ("d.tif", Image.fromarray(GREY16 / np.float32(65535))),
    ("a.ppm", Image.fromarray(GREY16.astype(np.int32)))])
def test_more_than_eight_bits_are_scaled_and_not_clipped(tmp_path, name, image):
    """A gradient of 256 levels must stay one, grey, from black to white."""
    picture = saved(tmp_path / name, image)
    assert (picture == np.arange(256, dtype=np.uint8)[:, None]).all() and picture.shape == (8, 256, 3)


@pytest.mark.parametrize("values, words", [
    (np.float32([[0, 255]]), "numbers from 0 to 255, and not 0 to 1"), (np.float32([[0, np.nan]]), "nan"), (np.float32([[-1, 1]]), "from -1"),
    (np.int32([[0, 200]]), "0 to 65535"), (np.int32([[0, 2**30]]), "0 to 65535"), (np.int32([[-5, 300]]), "from -5")])
def test_numbers_without_a_known_scale_are_refused_in_one_line(tmp_path, values, words):
    """Nobody can tell which of them is white, and a scale of its own would hide that one picture is darker."""
    with pytest.raises(VLMError, match=words) as error:
        saved(tmp_path / "a.tif", Image.fromarray(values))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tif", "a.webp"])
@pytest.mark.parametrize("orientation, side", [(1, "top"), (2, "top"), (3, "bottom"), (4, "bottom"), (5, "left"), (6, "right"), (7, "right"), (8, "left")])
def test_a_photo_is_turned_upright(tmp_path, name, orientation, side):
    """White above as stored; EXIF says where that belongs, and every viewer obeys."""
    pixels, exif = np.zeros((64, 32, 3), np.uint8), Image.Exif()
    pixels[:32], exif[0x0112] = 255, orientation
    picture = saved(tmp_path / name, Image.fromarray(pixels), exif=exif).astype(float)
    sides = {"top": picture[:8], "bottom": picture[-8:], "left": picture[:, :8], "right": picture[:, -8:]}
    assert max(sides, key=lambda name: sides[name].mean()) == side
    assert picture.shape == ((64, 32, 3) if orientation < 5 else (32, 64, 3))


def drawing(mode):
    """A black square on nothing; what is transparent is black beneath."""
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[20:44, 20:44, 3] = 255
    return Image.fromarray(pixels).quantize(4) if mode == "P" else Image.fromarray(pixels).convert(mode)


@pytest.mark.parametrize("name, mode", [("a.png", "RGBA"), ("a.png", "LA"), ("a.png", "P"), ("a.gif", "RGBA"), ("a.tif", "RGBA"), ("a.webp", "RGBA")])
def test_what_is_transparent_is_white(tmp_path, name, mode):
    """Otherwise the VLM sees black on black."""
    picture = saved(tmp_path / name, drawing(mode))
    assert (picture[0, 0] == 255).all() and (picture[32, 32] == 0).all() and picture.shape == (64, 64, 3)


def test_other_kinds_of_transparency_and_colour(tmp_path):
    """One colour of a palette or of RGB as the transparent one; half transparent; CMYK; one bit."""
    palette = Image.new("P", (64, 64), 0)
    palette.putpalette([0, 0, 0, 0, 0, 0])
    palette.paste(1, (20, 20, 44, 44))
    for name in ("a.gif", "b.png"):
        assert saved(tmp_path / name, palette, transparency=0)[[0, 32], [0, 32], 0].tolist() == [255, 0]
    assert saved(tmp_path / "c.png", Image.new("RGB", (8, 8), (1, 2, 3)), transparency=(1, 2, 3)).min() == 255
    assert saved(tmp_path / "d.png", Image.new("RGBA", (8, 8), (0, 0, 0, 128)))[0, 0].tolist() == [127] * 3
    for name in ("e.jpg", "e.tif"):
        assert saved(tmp_path / name, Image.new("CMYK", (8, 8), 0)).min() == 255
    for name in ("f.png", "f.tif", "f.gif"):
        assert saved(tmp_path / name, Image.new("1", (8, 8), 1)).min() == 255


def test_one_clear_colour_of_sixteen_bits_is_white(tmp_path):
    """Grey and RGB: Pillow forgets the first, and compares the second with eight bits."""
    for colour, value in ((0, b"\x80\0"), (2, b"\x80\0" * 3)):
        chunks = [(b"IHDR", struct.pack(">IIBBBBB", 4, 4, 16, colour, 0, 0, 0)), (b"tRNS", value),
                  (b"IDAT", zlib.compress((b"\0" + value * 4) * 3 + b"\0" + bytes(len(value) * 4))), (b"IEND", b"")]
        (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks))
        assert load_image(tmp_path / "a.png")[:, 0, 0].tolist() == [255, 255, 255, 0]


def sixteen_bit_tiff(path, values, photometric, sample_format):
    """(H, W) of 16 bits -> a TIFF whose tags Pillow would not write."""
    tags = {256: values.shape[1], 257: values.shape[0], 258: 16, 259: 1, 262: photometric, 273: 134, 277: 1,
            278: values.shape[0], 279: values.nbytes, 339: sample_format}
    path.write_bytes(b"II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + b"".join(
        struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags.items()) + bytes(4) + values.tobytes())
    return path


def test_sixteen_bits_where_white_is_zero_and_with_a_sign(tmp_path):
    """The first is turned round, the second refused: half of its range would be lost."""
    picture = load_image(sixteen_bit_tiff(tmp_path / "a.tif", GREY16, 0, 1))
    assert (picture == np.arange(255, -1, -1)[:, None]).all()
    with pytest.raises(VLMError, match="16 bits with a sign"):
        load_image(sixteen_bit_tiff(tmp_path / "b.tif", (GREY16 // 2).astype(np.int16), 1, 2))


def test_of_several_pages_the_first_is_taken(tmp_path):
    """A TIFF with pages, an animated PNG or WebP, and a phone's MPO."""
    first, second = (Image.new("RGB", (64, 64), (grey,) * 3) for grey in (10, 200))
    for name, settings in (("a.tif", {}), ("a.png", {}), ("a.webp", {"lossless": True}), ("a.jpg", {"format": "MPO"})):
        assert saved(tmp_path / name, first, save_all=True, append_images=[second], **settings).max() == 10


@pytest.mark.parametrize("name", ["a.png", "a.jpg", "a.gif", "a.tif", "a.bmp", "a.webp"])
def test_half_a_file_is_refused(tmp_path, name):
    """Half a picture must not pass for a whole one."""
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8)
    Image.fromarray(noise).save(tmp_path / name)
    raw = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(raw[:len(raw) * 2 // 3])
    with pytest.raises(VLMError, match="not an image that can be used"):
        load_image(tmp_path / name)


@pytest.mark.parametrize("raw", [b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(99), b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", b"<svg/>", b""])
def test_formats_that_cannot_be_read_are_refused_and_the_others_named(tmp_path, raw):
    """One line for HEIC and SVG; PostScript, which Pillow would hand to another program, is never opened."""
    (tmp_path / "a").write_bytes(raw)
    with pytest.raises(VLMError, match="it may be PNG, JPEG, GIF, TIFF, BMP, WEBP, PPM") as error:
        load_image(tmp_path / "a")
    assert "\n" not in str(error.value)


def test_a_large_picture_is_refused_without_a_warning(tmp_path, recwarn):
    """Pillow's own warning of a bomb would be two more lines."""
    Image.new("1", (10_001, 10_001)).save(tmp_path / "a.png")
    with pytest.raises(VLMError, match="10001 x 10001 pixels is too large"):
        load_image(tmp_path / "a.png")
    assert not list(recwarn)


def test_an_answer_of_megabytes_is_read_at_once():
    """A server may send 4 MiB of anything, and some patterns need the square of the length."""
    began = time.monotonic()
    for piece in ("Winner\n", "better ", "image 1 is ", "# ", "\n", "-1 "):
        parse_label(piece * (4_000_000 // len(piece)) + "1")
    assert time.monotonic() - began < 20
