"""What pack_vllm.py keeps of a library, and how vllm_generate.py counts, on a CPU."""

import struct

import pytest
from pack_vllm import CUBIN, FATBIN, PTX, Code, fatbins, pruned, used
from vllm_generate import LONGEST, REQUESTS, Answer, compare, prompts


def library(*sources):
    """A library of sources, each with codes (kind, capability); between them bytes that are none of a fatbin."""
    parts, places = [b"\x7fELF"], []
    for source in sources:
        codes = b""
        for kind, capability in source:
            payload = bytes([capability]) * (8 * capability)
            header = struct.pack("<HHIQIIHHI", kind, 0x101, 64, len(payload), 0, 0, 0, 0, capability)
            codes += header.ljust(64, b"h") + payload
        places.append(sum(map(len, parts)))
        parts += [FATBIN + struct.pack("<Q", len(codes)) + codes, b"between"]
    return b"".join(parts), places


SOURCES = [[(CUBIN, 80), (CUBIN, 90), (PTX, 80), (CUBIN, 120)], [(CUBIN, 80), (PTX, 80), (PTX, 75)], [(CUBIN, 100)]]


def test_codes_are_found():
    data, _ = library(*SOURCES)
    found = list(fatbins(data))
    assert [[(code.kind, code.capability) for code in codes] for codes in found] == SOURCES
    for code in (code for codes in found for code in codes):
        assert set(data[code.start : code.stop]) == {code.capability} and code.stop - code.start == 8 * code.capability


def test_only_other_gpus_code_becomes_zeros():
    data, _ = library(*SOURCES)
    result = pruned(data, 90)
    assert len(result) == len(data)
    kept = {(0, CUBIN, 90), (1, PTX, 80)}
    expected = bytearray(data)
    for place, codes in enumerate(fatbins(data)):
        for code in codes:
            if (place, code.kind, code.capability) not in kept:
                expected[code.start : code.stop] = bytes(code.stop - code.start)
    assert result == bytes(expected) != data


@pytest.mark.parametrize(
    ("capability", "expected"),
    [(80, [(CUBIN, 80)]), (89, [(CUBIN, 80), (CUBIN, 86)]), (90, [(PTX, 80)]), (75, []), (121, [(CUBIN, 120)])],
)
def test_what_a_gpu_runs(capability, expected):
    codes = [(CUBIN, 80), (CUBIN, 86), (PTX, 80), (CUBIN, 120)]
    found = used([Code(0, 1, *code) for code in codes], capability)
    assert [(code.kind, code.capability) for code in found] == expected


REFERENCE = [Answer([1, 2, 3, 4], [1, 2, 3, 4], [0.5, 0.001, 0.5, 0.5])]


def test_a_led_run_is_compared_everywhere():
    ours = [Answer([1, 2, 3, 4], [1, 9, 3, 8], [0.5] * 4)]
    assert compare(REFERENCE, ours, "led") == (4, 3, 2)


def test_a_free_run_is_compared_up_to_its_first_difference():
    assert compare(REFERENCE, [Answer([1, 9, 9, 9], [1, 9, 9, 9], [0.5] * 4)], "free") == (2, 1, 1)
    assert compare(REFERENCE, [Answer([1, 2, 9, 4], [1, 2, 9, 4], [0.5] * 4)], "free") == (3, 2, 1)
    assert compare(REFERENCE, REFERENCE, "free") == (4, 3, 3)


def test_prompts_are_of_mixed_lengths():
    drawn = prompts()
    assert len(drawn) == REQUESTS and drawn == prompts()
    lengths = sorted(map(len, drawn))
    assert lengths[0] < 10 and lengths[-1] >= LONGEST
    alike = [own for own in drawn if own[:200] == drawn[0][:200] and len(own) > 200]
    assert len(alike) > 5
