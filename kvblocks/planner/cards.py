"""Graphics cards by name, and the memory of one. Knows nothing of models.

To add a card, add a line to `CARDS`.
"""

import re

__all__ = ["CARDS", "card_memory", "parse_gpu"]

# MiB of one card, as its driver reports the total (`nvidia-smi`, `rocm-smi --showmeminfo vram`); what the driver keeps
# is not in it. Read in what the driver printed, which people publish with their issues and logs: among others
# github.com/modal-labs/modal-client/pull/2797 (T4, L4, A10, L40S, A100 of both sizes, H100),
# NVIDIA/TensorRT-LLM/issues/10278 (B200), noonghunna/club-3090/issues/1129 (RTX 3090), RLinf/RLinf/issues/255 (RTX
# 4090), and logs of H200 (143771MiB), B300 (275040MiB), H100 NVL (95830MiB), GH200 and H20 (97871MiB), A40 and L40
# (46068MiB), RTX A6000 and RTX 6000 Ada (49140MiB), RTX 5090 (32607MiB), RTX PRO 6000 (97887MiB), A30 (24576MiB), V100
# (16384MiB and 32768MiB by drivers since 510, which count what the driver keeps as well; 16160MiB and 32510MiB before),
# MI250X (68702699520 bytes a die), MI300X (206141652992) and MI355X (309220868096). ROCm's are 16 MiB less than whole
# GiB, by which MI325X is named, which was not seen printed.
CARDS: dict[str, int] = {
    "t4": 15360,
    "v100-16g": 16384,
    "v100": 32768,
    "l4": 23034,
    "a10": 23028,
    "a10g": 23028,
    "a30": 24576,
    "a40": 46068,
    "l40": 46068,
    "l40s": 46068,
    "a100-40g": 40960,
    "a100": 81920,
    "h20": 97871,
    "h100": 81559,
    "h100-nvl": 95830,
    "gh200": 97871,
    "h200": 143771,
    "b200": 183359,
    "b300": 275040,
    "rtx3090": 24576,
    "rtx4090": 24564,
    "rtx5090": 32607,
    "rtxa6000": 49140,
    "rtx6000ada": 49140,
    "rtxpro6000": 97887,
    "mi250x": 65520,  # one of its two dies
    "mi300x": 196592,
    "mi325x": 262128,
    "mi355x": 294896,
}


def parse_gpu(text: str) -> tuple[str, int | None]:
    """The name and the number in "h100:8"; the number is None where only a name is given.

    Raises:
        TypeError, ValueError: not text; a card that is not in the table, or no number of cards after the colon.
    """
    if not isinstance(text, str):
        raise TypeError(f"gpu={text!r:.60} is of type {type(text).__name__}; give a card like 'h100' or 'h100:8'")
    name, colon, number = text.strip().lower().partition(":")
    found = next((card for card in CARDS if _plain(card) == _plain(name)), None)
    if found is None:
        raise ValueError(f"gpu={text!r:.60} is not a card in the table; give memory, or one of {', '.join(CARDS)}")
    if not colon:
        return found, None
    if not number.isdecimal() or not 1 <= int(number) <= 4096:
        raise ValueError(f"gpu={text!r:.60}: after the colon comes the number of cards, 1 to 4096, as in {found}:8")
    return found, int(number)


def card_memory(name: str) -> int:
    """Bytes of one card of the table; KeyError for a name that is not in it."""
    return CARDS[name] * 2**20


def _plain(name: str) -> str:
    return re.sub(r"[-_ ]|(?<=g)b$", "", name.lower())
