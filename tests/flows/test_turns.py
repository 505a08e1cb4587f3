"""Writers of a server on SQLite: a real database, and transactions that read before they write."""

from __future__ import annotations

import asyncio
import inspect
import sqlite3
from contextlib import closing

import httpx
import pytest
from fastapi import FastAPI
from prefect.server.api import server as prefect_api
from prefect.server.api.server import RequestLimitMiddleware
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute

from flows import turns


@pytest.fixture
def database(tmp_path):
    path = tmp_path / "numbers.db"
    with sqlite3.connect(path) as opened:
        opened.execute("PRAGMA journal_mode = WAL")
        opened.execute("CREATE TABLE numbers (number INTEGER)")
        opened.execute("INSERT INTO numbers VALUES (0)")
    return path


def server(database, seen):
    """As Prefect's: a transaction that reads, is away for a while, and then writes; and an answer
    to its errors, which are raised all the same."""

    async def count(request):
        seen.append((request.method, await request.body()))
        with closing(sqlite3.connect(database, isolation_level=None, timeout=0.01)) as opened:
            opened.execute("BEGIN")
            [number] = opened.execute("SELECT number FROM numbers").fetchone()
            await asyncio.sleep(0.02)
            if request.method == "POST":
                opened.execute("UPDATE numbers SET number = ?", [number + 1])
            opened.execute("COMMIT")
        return PlainTextResponse(str(number + 1), 201)

    async def unavailable(request, error):
        return PlainTextResponse(str(error), 503)

    routes = [Route(path, count, methods=["GET", "POST"]) for path in ("/", "/filter")]
    return Starlette(routes=routes, exception_handlers={Exception: unavailable})


def ask(app, *paths, method="POST"):
    async def go():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            calls = [client.request(method, path, content=f"{n}") for n, path in enumerate(paths)]
            return await asyncio.gather(*calls)

    return asyncio.run(go())


def test_writers_are_refused_without_turns_and_answered_in_order_with_them(database):
    refused = [a for a in ask(server(database, []), *["/"] * 8) if a.status_code == 503]
    assert refused and {answer.text for answer in refused} == {"database is locked"}

    with sqlite3.connect(database) as opened:
        opened.execute("UPDATE numbers SET number = 0")
    seen = []
    answers = ask(turns.Turns(server(database, seen)), *["/"] * 8)
    assert [answer.status_code for answer in answers] == [201] * 8
    assert [answer.text for answer in answers] == [str(n) for n in range(1, 9)]
    assert seen == [("POST", str(n).encode()) for n in range(8)]


def test_request_is_repeated_where_the_servers_own_services_come_between(database, monkeypatch):
    monkeypatch.setattr(turns, "PAUSE", 0.0)
    seen = []

    async def services(app):
        """Write in the middle of the first two attempts."""
        for attempt in (1, 2):
            while len(seen) < attempt:
                await asyncio.sleep(0.001)
            await asyncio.sleep(0.005)
            with sqlite3.connect(database) as opened:
                opened.execute("UPDATE numbers SET number = number + 10")

    async def go():
        app = turns.Turns(server(database, seen))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return (await asyncio.gather(client.post("/", content="x"), services(app)))[0]

    answer = asyncio.run(go())
    assert (answer.status_code, answer.text) == (201, "21")
    assert seen == [("POST", b"x")] * 3


def test_reads_do_not_wait_and_a_lasting_refusal_is_passed_on(database, monkeypatch):
    monkeypatch.setattr(turns, "REPEATS", 2)
    seen = []
    app = turns.Turns(server(database, seen))
    with sqlite3.connect(database, isolation_level=None) as opened:
        opened.execute("BEGIN IMMEDIATE")
        [refused] = ask(app, "/")
        assert (refused.status_code, refused.text) == (503, "database is locked")
        assert len(seen) == 3

        async def while_a_writer_has_its_turn():
            async with app.lock:
                transport = httpx.ASGITransport(app, raise_app_exceptions=False)
                async with httpx.AsyncClient(transport=transport, base_url="http://s") as client:
                    return (await client.get("/")).text, (await client.post("/filter")).status_code

        assert asyncio.run(while_a_writer_has_its_turn()) == ("1", 503)


def test_streams_of_events_leave_room_for_requests(monkeypatch):
    monkeypatch.setattr(turns, "PREFECT_API_DATABASE_CONNECTION_URL", Setting("sqlite://"))
    streaming, ended = asyncio.Semaphore(0), asyncio.Event()

    async def stream(websocket):
        await websocket.accept()
        streaming.release()
        await ended.wait()

    async def answer(request):
        return PlainTextResponse("here")

    routes = [WebSocketRoute("/stream", stream), Route("/", answer)]
    prefect = FastAPI(routes=routes)
    prefect.add_middleware(RequestLimitMiddleware, limit=2)
    app = turns.for_database(prefect)

    async def go():
        scope = {"type": "websocket", "path": "/stream", "headers": [], "query_string": b""}
        streams = [asyncio.create_task(app({**scope}, connect, ignore)) for _ in range(3)]
        for _ in streams:
            await streaming.acquire()
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            found = await asyncio.wait_for(client.get("/"), 5)
        ended.set()
        await asyncio.gather(*streams)
        return found.text

    assert asyncio.run(go()) == "here"


def test_prefects_limit_is_the_one_that_is_replaced(monkeypatch):
    monkeypatch.setattr(turns, "PREFECT_API_DATABASE_CONNECTION_URL", Setting("sqlite://"))
    prefect = FastAPI()
    prefect.add_middleware(RequestLimitMiddleware, limit=100)
    turns.for_database(prefect)
    assert [m.cls for m in prefect.user_middleware] == [turns.RequestLimit]
    source = inspect.getsource(prefect_api.create_app)
    assert "app.add_middleware(RequestLimitMiddleware, limit=100)" in source


class Setting:
    def __init__(self, text):
        self.text = text

    def value(self):
        return self.text


async def connect():
    return {"type": "websocket.connect"}


async def ignore(message):
    pass
