"""The server, asked by a real client."""

import asyncio
import json
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from recbole_simdiff import load
from recbole_simdiff.cli.main import main
from recbole_simdiff.serving.recommender import Recommender
from tests.conftest import SEQUENCES
from tests.serving.conftest import train

for library in ("fastapi", "uvicorn", "prometheus_client", "httpx"):
    pytest.importorskip(library, reason="the extras serve and test")

import httpx  # noqa: E402

from tests.serving.client import Running, running, send  # noqa: E402

ITEMS = [f"i{n}" for n in range(1, 13)]


@pytest.fixture(scope="module")
def server(run_dir: Path) -> Iterator[Running]:
    """Small limits, and no token."""
    limits = ("--max_body_bytes=20000", "--max_histories=4", "--max_k=20", "--timeout=3")
    with running(run_dir, *limits) as found:
        yield found


def post(server: Running, body: Any, **options: Any) -> httpx.Response:
    """The answer of POST /recommend."""
    return httpx.post(f"{server.url}/recommend", json=body, timeout=30, **options)


def test_one_history_gets_what_recommend_gives(server: Running, recommender: Recommender) -> None:
    response = post(server, {"items": ["i1", "zz", "i2"], "k": 5})
    (wanted,) = recommender.recommend([["i1", "i2"]], k=5)
    assert response.status_code == 200
    assert response.json() == {
        "items": wanted.items,
        "scores": pytest.approx(wanted.scores),
        "unknown": ["zz"],
        "fallback": False,
    }


def test_many_get_an_answer_each(server: Running, recommender: Recommender) -> None:
    (full,) = recommender.recommend([["i1"]], k=12)
    queries = [
        {"items": ["i1"]},
        {"items": ["i1"], "exclude": full.items[:1]},
        {"items": ["i1"], "allowed": [full.items[3]]},
        {"user": "e"},
    ]
    body = {"requests": queries, "k": 12, "exclude": [full.items[1]]}
    answers = post(server, body).json()["answers"]
    assert [one["items"] for one in answers[:3]] == [
        [full.items[0], *full.items[2:]],
        full.items[2:],
        [full.items[3]],
    ]
    assert set(answers[3]["items"]) == set(ITEMS) - set(SEQUENCES["e"]) - {full.items[1]}


def test_options_of_recommend(server: Running, recommender: Recommender) -> None:
    kept = post(server, {"items": ["i1", "i2"], "k": 12, "seen": "keep"}).json()
    assert set(kept["items"]) == set(ITEMS)
    fallen = post(server, {"items": [], "k": 3, "fallback": "popular"}).json()
    (wanted,) = recommender.recommend([[]], k=3, fallback="popular")
    assert (fallen["items"], fallen["fallback"]) == (wanted.items, True)
    mixed = post(server, {"requests": [{"items": ["zz"]}, {"items": ["i1"]}]}).json()["answers"]
    assert mixed[0] == {"items": [], "scores": [], "unknown": ["zz"], "fallback": False}
    assert mixed[1]["items"]


def test_a_missing_checkpoint_is_named(tmp_path: Path, capsys: Any) -> None:
    assert main(["serve", f"--checkpoint={tmp_path / 'gone'}", "--port=0"]) == 2
    assert "no checkpoint at" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"items": ["zz"]}, "no history has an item of the training data"),
        ({"items": []}, "no history has an item of the training data"),
        ({"user": "zoe"}, "user 'zoe' is not in the data set"),
        ({}, "give one of items, user and requests"),
        ({"items": ["i1"], "user": "a"}, "give one of items, user and requests"),
        ({"requests": [{}]}, "each of requests must have either items or user"),
        ({"requests": []}, "body.requests: List should have at least 1 item"),
        ({"requests": [{"items": ["i1"]}] * 5}, "5 requests at once; at most 4"),
        ({"items": ["i1"], "k": 0}, "body.k: Input should be greater than or equal to 1"),
        ({"items": ["i1"], "k": 21}, "k=21 must be at most 20"),
        ({"items": ["i1"], "k": True, "seen": "perhaps"}, "body.seen"),
        ({"items": ["i1"], "fallback": "random"}, "fallback='random' must be one of popular"),
        ({"items": "i1"}, "body.items: Input should be a valid list"),
        ({"items": [["i1"]]}, "body.items.0"),
        ({"items": [1.5]}, "body.items.0"),
        ({"items": ["i1"], "topk": 3}, "body.topk: Extra inputs are not permitted"),
        ([["i1"]], "body: "),
    ],
)
def test_mistakes_are_answered_with_what_is_wrong(server: Running, body: Any, message: str) -> None:
    response = post(server, body)
    assert response.status_code == 422
    assert message in response.json()["detail"]


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b'{"items": ["i1"]',
        b"\xff\xfe\x00",
        b'{"items": ["i1"], "k": NaN}',
        b'{"items": ["i1"], "k": 1e999}',
        b'{"items": ["i1"], "\\ud800": 1}',
        b'{"items": ["\\ud800"]}',
        b"[" * 9000 + b"]" * 9000,
        b'{"items": [' + b"1" * 9000 + b"]}",
        b"null",
    ],
    ids=range(11),
)
def test_a_body_that_is_no_request_is_refused(server: Running, content: bytes) -> None:
    headers = {"content-type": "application/json"}
    response = httpx.post(f"{server.url}/recommend", content=content, headers=headers, timeout=30)
    assert 400 <= response.status_code < 500
    assert response.json()["detail"]


@pytest.mark.parametrize("size", [20_001, 150_000, 5_000_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_a_huge_body_is_refused(server: Running, size: int, chunked: bool) -> None:
    pieces = (b"x" * 5000 for _ in range(size // 5000 + 1))
    content: Any = pieces if chunked else b"x" * size
    try:
        response = httpx.post(f"{server.url}/recommend", content=content, timeout=30)
    except httpx.NetworkError:  # closed while the client wrote more than is read
        assert size == 5_000_000
    else:
        assert response.status_code == 413
        assert response.json() == {"detail": "the body has more than 20000 bytes"}
    assert post(server, {"items": ["i1"]}).status_code == 200


def test_a_body_that_does_not_arrive_is_given_up(server: Running) -> None:
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=30) as connection:
        connection.sendall(b"POST /recommend HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{")
        begin = time.monotonic()
        answer = connection.recv(1000)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert 2 < time.monotonic() - begin < 20


def test_items_are_listed_in_pages(server: Running) -> None:
    pages = [
        httpx.get(f"{server.url}/items", params={"offset": offset, "limit": 5}).json()
        for offset in (0, 5, 10, 15)
    ]
    assert [row["id"] for page in pages for row in page["items"]] == ITEMS
    assert {page["n_items"] for page in pages} == {12}
    assert httpx.get(f"{server.url}/items", params={"limit": 0}).status_code == 422


def test_health_says_what_is_served(server: Running) -> None:
    found = httpx.get(f"{server.url}/health").json()
    assert (found["status"], found["model"], found["dataset"]) == ("ok", "SASRecCE", "toy")
    assert (found["n_items"], found["number"]) == (12, 0)
    assert httpx.get(f"{server.url}/nowhere").status_code == 404
    assert httpx.get(f"{server.url}/recommend").status_code == 405


def samples(server: Running, **options: Any) -> dict[str, float]:
    """The numbers of /metrics, without those of the process."""
    response = httpx.get(f"{server.url}/metrics", **options)
    assert response.headers["content-type"].startswith("text/plain; version=")
    lines = (line.rsplit(" ", 1) for line in response.text.splitlines() if line[0] != "#")
    return {name: float(value) for name, value in lines if name.startswith("simdiff_")}


def test_metrics_count_requests_and_histories(server: Running) -> None:
    before = samples(server)
    for body in ({"items": ["i1"]}, {"items": ["zz"], "fallback": "popular"}, {}):
        post(server, body)
    httpx.get(f"{server.url}/some/other/path")
    after = samples(server)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0.0)

    assert grown('simdiff_requests_total{path="/recommend",status="200"}') == 2
    assert grown('simdiff_requests_total{path="/recommend",status="422"}') == 1
    assert grown('simdiff_requests_total{path="other",status="404"}') == 1
    assert grown('simdiff_request_seconds_count{path="/recommend"}') == 3
    assert grown('simdiff_histories_total{by="model"}') == 1
    assert grown('simdiff_histories_total{by="fallback"}') == 1
    assert after["simdiff_requests_in_progress"] == 1  # this one
    assert 0 <= time.time() - after["simdiff_model_loaded_timestamp_seconds"] < 3600


# ---------------------------------------------------------------------- many at once


def every_history() -> list[list[str]]:
    """Histories of one, two and three items."""
    return [list(items) for n in (1, 2, 3) for items in product(ITEMS, repeat=n)]


def test_no_request_of_many_is_lost_or_wrong(server: Running, recommender: Recommender) -> None:
    """The short form of tests/benchmarks/serving.py."""
    histories = every_history()[:1000]
    bodies = [{"items": items, "k": 5} for items in histories]
    load = asyncio.run(send(server.url, bodies, connections=32))
    for found, wanted in zip(load.answers, recommender.recommend(histories, k=5), strict=True):
        assert found is not None
        assert found[0] == 200
        assert found[1]["scores"] == pytest.approx(wanted.scores, abs=1e-5)
        assert found[1]["items"] == wanted.items


def test_a_newer_checkpoint_is_taken_without_losing_a_request(
    run_dir: Path, tmp_path: Path
) -> None:
    """Each answer is the old model's or the new one's, and the last ones are the new one's."""
    place = tmp_path / "best.safetensors"
    newer = train(tmp_path / "newer", epochs=2, seed=7) / "best.safetensors"
    shutil.copy(run_dir / "best.safetensors", place)
    body = {"items": ["i1", "i2"], "k": 12}
    old, new = (
        load(path, use_gpu=False).recommend([["i1", "i2"]], k=12)[0].items
        for path in (run_dir, newer)
    )
    assert old != new
    with running(place, "--watch=0.2") as server:
        assert post(server, body).json()["items"] == old
        stop, seen = threading.Event(), []

        def ask() -> None:
            with httpx.Client(timeout=30) as client:
                while not stop.is_set():
                    seen.append(client.post(f"{server.url}/recommend", json=body))

        asking = [threading.Thread(target=ask) for _ in range(4)]
        for thread in asking:
            thread.start()
        (tmp_path / "part").write_bytes(b"no checkpoint")
        (tmp_path / "part").replace(place)
        wait_for(lambda: samples(server).get('simdiff_reloads_total{result="failed"}') == 1)
        shutil.copy(newer, tmp_path / "part")
        (tmp_path / "part").replace(place)
        wait_for(lambda: httpx.get(f"{server.url}/health").json()["number"] == 1)
        last = post(server, body).json()["items"]
        stop.set()
        for thread in asking:
            thread.join()
        assert last == new
        assert {response.status_code for response in seen} == {200}
        assert {tuple(response.json()["items"]) for response in seen} == {tuple(old), tuple(new)}


def wait_for(condition: Any) -> None:
    """Until it is true, or for a minute."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_requests_in_work_are_answered_before_it_stops(run_dir: Path, number: int) -> None:
    with running(run_dir) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as connection:
            body = json.dumps({"items": ["i1"]}).encode()
            head = f"POST /recommend HTTP/1.1\r\nhost: x\r\ncontent-length: {len(body)}\r\n"
            connection.sendall(f"{head}content-type: application/json\r\n\r\n".encode())
            wait_for(lambda: samples(server)["simdiff_requests_in_progress"] == 2)
            server.process.send_signal(number)
            wait_for(lambda: refused(host, int(port)))
            connection.sendall(body)
            answer = connection.recv(10_000)
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert server.process.wait(30) == 0


def refused(host: str, port: int) -> bool:
    """Whether nobody listens there any more."""
    try:
        socket.create_connection((host, port), timeout=5).close()
    except ConnectionError:
        return True
    return False


# ---------------------------------------------------------------------- token and command line


@pytest.mark.parametrize("source", ["file", "environment"])
def test_with_a_token_only_health_is_open(run_dir: Path, tmp_path: Path, source: str) -> None:
    (tmp_path / "token").write_text("Se-cret\n")
    given = (f"--token_file={tmp_path / 'token'}",) if source == "file" else ()
    with running(run_dir, *given, RECBOLE_SIMDIFF_TOKEN="Se-cret") as server:
        assert httpx.get(f"{server.url}/health").status_code == 200
        paths = ("/items", "/metrics", "/openapi.json", "/nowhere")
        for header in ({}, {"authorization": "Bearer other"}, {"authorization": "Se-cret"}):
            codes = [httpx.get(server.url + path, headers=header).status_code for path in paths]
            assert codes == [401] * 4
            assert post(server, {"items": ["i1"]}, headers=header).status_code == 401
        header = {"authorization": "Bearer Se-cret"}
        assert post(server, {"items": ["i1"]}, headers=header).status_code == 200
        assert samples(server, headers=header)


def test_filters_and_fallback_of_the_server(run_dir: Path, tmp_path: Path) -> None:
    """They are read again when their file changes."""
    path = tmp_path / "barred"
    path.write_text("i5\ni6\n")
    with running(run_dir, f"--exclude={path}", "--fallback=popular", "--watch=0.2") as server:
        found = post(server, {"items": ["i1"], "k": 12, "exclude": ["i7"]}).json()["items"]
        assert set(found) == set(ITEMS) - {"i1", "i5", "i6", "i7"}
        assert post(server, {"items": ["zz"]}).json()["fallback"] is True
        path.write_text("i9\n")
        wait_for(lambda: httpx.get(f"{server.url}/health").json()["number"] == 1)
        found = post(server, {"items": ["i1"], "k": 12}).json()["items"]
        assert set(found) == set(ITEMS) - {"i1", "i9"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--port=70000"], "--port=70000 must be from 0 to 65535"),
        (["--max_k=0"], "--max_k=0 must be more than 0"),
        (["--timeout=-1"], "--timeout=-1.0 must be more than 0"),
        (["--grace=inf"], "--grace=inf must be a finite number"),
        (["--watch=-1"], "--watch=-1.0 must be at least 0"),
        (["--host=no.such.host.invalid"], "cannot listen on --host=no.such.host.invalid"),
        (["--token_file=gone"], "--token_file=gone cannot be read"),
        (["--topk=3"], "serve does not know --topk; see serve --help"),
        (["--exclude=gone"], "cannot read gone"),
    ],
)
def test_mistakes_of_serve(run_dir: Path, capsys: Any, given: list[str], message: str) -> None:
    assert main(["serve", f"--checkpoint={run_dir}", "--use_gpu=false", *given]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("token", ["", " \n", "two words", "schlüssel"])
def test_a_token_that_no_header_can_hold_is_refused(
    run_dir: Path, tmp_path: Path, capsys: Any, token: str
) -> None:
    (tmp_path / "token").write_text(token)
    given = [f"--checkpoint={run_dir}", f"--token_file={tmp_path / 'token'}"]
    assert main(["serve", *given]) == 2
    assert "must be a token of visible ASCII characters" in capsys.readouterr().err


def test_a_port_in_use_is_named(run_dir: Path, server: Running, capsys: Any) -> None:
    port = server.url.rsplit(":", 1)[1]
    assert main(["serve", f"--checkpoint={run_dir}", f"--port={port}"]) == 2
    assert f"cannot listen on --host=127.0.0.1 --port={port}" in capsys.readouterr().err
