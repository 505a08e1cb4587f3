"""The middleware in front of the page, with a bare application behind it."""

from __future__ import annotations

import asyncio
import time

import httpx
import pytest

from rlhf_core.playground import guard


async def behind(scope, receive, send):
    message = {"more_body": True}
    body = b""
    while message.get("more_body"):
        message = await receive()
        body += message.get("body", b"")
    right = scope["path"] != "/login" or b"right" in body
    await send({"type": "http.response.start", "status": 200 if right else 400, "headers": []})
    await send({"type": "http.response.body", "body": b"hello"})


def client(app, address="10.0.0.1"):
    transport = httpx.ASGITransport(app, client=(address, 1))
    return httpx.AsyncClient(transport=transport, base_url="http://page", timeout=30)


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/", 200), ("GET", "/assets/index.js", 200), ("GET", "/gradio_api/queue/data", 200),
        ("POST", "/gradio_api/queue/join", 200), ("POST", "/gradio_api/cancel", 200),
        ("POST", "/gradio_api/upload", 403), ("POST", "/upload", 403),
        ("POST", "/gradio_api/process_recording", 403), ("POST", "/gradio_api/stream/x", 403),
        ("POST", "/gradio_api/component_server", 403), ("POST", "/gradio_api/vibe-edit/", 403),
        ("GET", "/gradio_api/proxy=http://127.0.0.1/", 403),
        ("GET", "/gradio_api/file=http://127.0.0.1/", 403),
        ("PUT", "/", 405), ("DELETE", "/gradio_api/queue/join", 405),
    ],
)  # fmt: skip
def test_only_what_the_page_needs_is_there_and_every_answer_has_a_policy(method, path, status):
    async def ask():
        async with client(guard.Guard(behind)) as asking:
            return await asking.request(method, path)

    answer = asyncio.run(ask())
    assert answer.status_code == status
    policy = dict(
        p.strip().split(" ", 1) for p in answer.headers["content-security-policy"].split(";")
    )
    assert policy["default-src"] == "'none'" and policy["form-action"] == "'self'"
    assert "http" not in str(policy) and "*" not in str(policy), "nothing from elsewhere"
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_other_pages_cannot_post():
    async def ask(site):
        async with client(guard.Guard(behind)) as asking:
            headers = {"sec-fetch-site": site}
            return (await asking.post("/gradio_api/queue/join", headers=headers)).status_code

    assert [asyncio.run(ask(site)) for site in ("same-origin", "none")] == [200, 200]
    assert [asyncio.run(ask(site)) for site in ("cross-site", "same-site")] == [403, 403]


def test_long_bodies_are_refused_before_they_are_read():
    async def ask(content):
        async with client(guard.Guard(behind)) as asking:
            return (await asking.post("/gradio_api/queue/join", content=content)).status_code

    async def endless():
        yield b"x"

    assert asyncio.run(ask(b"x" * guard.MAX_BODY_BYTES)) == 200
    assert asyncio.run(ask(b"x" * (guard.MAX_BODY_BYTES + 1))) == 413
    assert asyncio.run(ask(endless())) == 413


def test_wrong_passwords_wait_in_line_and_hold_up_nobody_else(monkeypatch):
    monkeypatch.setattr(guard, "WRONG_PASSWORD_SECONDS", 0.1)

    async def login(app, address, password):
        async with client(app, address) as asking:
            answer = await asking.post("/login", content=password)
            return answer.status_code, time.monotonic()

    async def attack():
        app = guard.Guard(behind)
        began = time.monotonic()
        guesses = [asyncio.create_task(login(app, "10.0.0.66", b"wrong")) for _ in range(5)]
        await asyncio.sleep(0.02)
        async with client(app, "10.0.0.66") as asking:
            page = await asking.get("/")
        status, at = await login(app, "10.0.0.1", b"right")
        assert (page.status_code, status) == (200, 200) and at - began < 0.1
        found = await asyncio.gather(*guesses)
        assert [s for s, _ in found] == [400] * 5 and max(t for _, t in found) - began >= 0.5
        assert app._turns == {}

    asyncio.run(attack())


def test_a_login_that_comes_slowly_holds_up_nobody_else_of_its_address():
    async def attack():
        app, go_on = guard.Guard(behind), asyncio.Event()

        async def slowly():
            yield b"ri"
            await go_on.wait()
            yield b"ght"

        async with client(app, "10.0.0.66") as asking:
            length = {"content-length": "5"}
            slow = asyncio.create_task(asking.post("/login", content=slowly(), headers=length))
            await asyncio.sleep(0.02)
            other = await asyncio.wait_for(asking.post("/login", content=b"right"), 5)
            assert not slow.done()
            go_on.set()
            assert (other.status_code, (await slow).status_code) == (200, 200)

    asyncio.run(attack())
