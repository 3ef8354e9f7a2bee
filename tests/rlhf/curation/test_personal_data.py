"""Personal data with a fixed format, secrets, and what only looks like them."""

import json
from pathlib import Path

import pytest

from rlhf.curation.personal_data import personal_data_in
from rlhf.curation.secrets import secrets_in


@pytest.mark.parametrize(("text", "item"), [
    ("write to jane.doe+news@mail.qorvexlume.org please", "e-mail: jane.doe+news@mail.qorvexlume.org"),
    ("call me at (415) 555-2671 tomorrow", "phone number: (415) 555-2671"),
    ("my number is +44 20 7946 0958.", "phone number: +44 20 7946 0958"),
    ("pay with 4539 5789 2140 6176 now", "card number: 4539 5789 2140 6176"),
    ("amex 371482175398412", "card number: 371482175398412"),
    ("send it to DE89 3704 0044 0532 0130 00 today", "account number: DE89 3704 0044 0532 0130 00"),
    ("my ssn is 536-90-4399", "account number: 536-90-4399"),
    ("ping 23.45.67.89 for me", "IP address: 23.45.67.89"),
    ("host 2a02:8108:85a3::8a2e:370:7334 is down", "IP address: 2a02:8108:85a3::8a2e:370:7334"),
    ("i live at 221 Baker Street in town", "street address: 221 Baker Street"),
    ("1642 Pennsylvania Ave. is white", "street address: 1642 Pennsylvania Ave."),
    ("Ann Smith, date of birth 3 May 1984", "date of birth: date of birth 3 May 1984"),
    ("use ghp_FakeFakeFakeFakeFakeFakeFakeFake0123", "secret: GitHub Token, ghp_Fake..."),
])
def test_personal_data_is_detected(text: str, item: str) -> None:
    assert personal_data_in(text) == [item]


@pytest.mark.parametrize("text", [
    "", "in 1984 there were 12 of 365 days", "version 1.2.3.4 of the program", "python 3.11.2.1", "it costs 1,234.89",
    "order 4111111111111112 failed",  # not a card: the checksum is wrong
    "0000 0000 0000 0000", "call 911", "12:30:45", "std::vector<int> a::b", "user @home", "@mention", "1-2-3-4-5-6-7",
    "localhost 127.0.0.1 or 0.0.0.0", "mask 255.255.255.0", "300.400.500.600", "the 3 wise men of Gotham",
    "pi is 3.14159265358979", "id 123456789012", "2023-10-05 14:22:10", "GB00 AAAA 0000 0000 0000 00", "000-12-3456",
    "first 2 Street fighters", "10 drive", "isbn 978-3-16-148410-0", "the 2010 Supreme Court decision",
    "write to jane@mail.example.org", "ping 203.0.113.77", "the router at 192.168.1.10.", "host 2001:db8:85a3::7334",
    # those that everybody knows: cards of payment services' tests, addresses of stories
    "pay with 4111 1111 1111 1111", "amex 378282246310005", "221B Baker Street", "1600 Pennsylvania Ave. is white",
    "upgrade to Ubuntu 20.04.1.25",
    "800 - 555 - 1234 = -989", "7.  123456789\n8.  1234567",
])
def test_other_numbers_are_not_personal_data(text: str) -> None:
    assert personal_data_in(text) == []


@pytest.mark.parametrize(("file", "size"), [("personal_data.jsonl", 300), ("personal_data_held_out.jsonl", 60)])
def test_precision_and_recall_on_labelled_snippets_are_at_least_nine_tenths(file: str, size: int) -> None:
    lines = (Path(__file__).parent / file).read_text("utf-8").splitlines()
    snippets = [(item["text"], item["personal"]) for item in map(json.loads, lines)]
    found = [(bool(personal_data_in(text)), personal) for text, personal in snippets]
    assert len(snippets) == size
    assert sum(personal for _, personal in snippets) == size // 2
    hits = found.count((True, True))
    assert hits >= 0.9 * sum(flag for flag, _ in found)  # precision
    assert hits >= 0.9 * size / 2  # recall


def test_detect_secrets_alone_finds_fewer_keys_than_with_the_newer_forms() -> None:
    assert secrets_in("sk-proj-Zk3vQ9xTb7LmNc2RpWs8Yd5FhGj1KaEu") == ["OpenAI API key, sk-proj-..."]
    assert secrets_in("AKIAQ3EGZ7LPMTR5WXYB") == ["AWS Access Key, AKIAQ3EG..."]
    assert secrets_in("AKIAIOSFODNN7EXAMPLE") == []


@pytest.mark.parametrize("piece", ["sk-", "a", "1", "a@", "1-", "-", ".", "a.", "AKIA", "(1", "é", " "])
@pytest.mark.parametrize("end", ["", "@", " 1"])
def test_long_texts_of_one_piece_are_read_in_linear_time(piece: str, end: str) -> None:
    """With a pattern whose time grows with the square of the length this takes minutes."""
    text = (piece * 300_000)[:300_000] + end + "\n\nWrite to tess.orlin@qorvexlume-post.net"
    assert any("tess.orlin" in item for item in personal_data_in(text))
