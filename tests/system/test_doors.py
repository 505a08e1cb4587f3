"""What others get from a running system: callers without its login, pages, users of the machine."""

from __future__ import annotations

import http.client
import http.server
import re
import socket
import stat
import threading

import httpx
import psutil
import pytest

from tests.system.conftest import until
from tests.system.test_browser import CHROMIUM, page, stranger  # noqa: F401 (fixtures)

pytestmark = [pytest.mark.slow, pytest.mark.system]

# Without a login, on the Prefect server: probes, the pages' own files, what Prefect's documentation
# says anyway, and whether there is a login.
PUBLIC = ("/", "/api/health", "/api/ready", "/docs", "/redoc", "/openapi.json", "/ui-settings")
# Everything that a run, a secret or a shell could be read or started from.
API = (
    "/api/deployments/filter", "/api/flow_runs/filter", "/api/flow_runs/", "/api/logs/filter",
    "/api/block_documents/filter", "/api/artifacts/filter", "/api/variables/filter",
    "/api/work_pools/filter", "/api/automations/filter", "/api/events/filter", "/api/version",
    "/api/admin/settings", "/api/admin/version", "/api/csrf-token", "/api/docs", "/api/static/x",
    "/api//health", "/api/x/health", "/api/health/../version",
)  # fmt: skip


def listening(system):
    """(address, port) -> words of its process."""
    found = {}
    for process in system.processes():
        for connection in process.net_connections():
            if connection.status == psutil.CONN_LISTEN:
                words = " ".join(process.cmdline())
                found[connection.laddr.ip, connection.laddr.port] = words
    return found


def answer(port, method, path, headers=()):
    """Status of an anonymous request; None if what listens there does not speak HTTP."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        body = b"{}" if method == "POST" else None
        typed = {"content-type": "application/json"} if body else {}
        connection.request(method, path, body, {**typed, **dict(headers)})
        return connection.getresponse().status
    except (http.client.HTTPException, ConnectionError):
        return None
    finally:
        connection.close()


def test_every_address_is_of_this_machine_and_known(system):
    found = listening(system)
    assert {ip for ip, _ in found} == {"127.0.0.1"}
    kinds = {"flows.api_server": 0, "weed": 0, "flows.warm.worker": 0}
    for words in found.values():
        [kind] = [kind for kind in kinds if kind in words]
        kinds[kind] += 1
    print(kinds, sorted(port for _, port in found))
    assert kinds.pop("flows.warm.worker") <= 2, "each may have a flow run that is just ending"
    assert kinds == {"flows.api_server": 1, "weed": 10}


def test_worker_answers_nothing_to_whom_it_has_not_started(system):
    """While a flow run is in progress, its worker listens for it. Each has a token
    (prefect.runner._control_channel)."""
    system.plan(sft=["wait:20"])
    run = system.submit("seed=902", "stages=[sft]")

    def ports():
        return [at for at, words in listening(system).items() if "flows.warm.worker" in words]

    for address in until(ports, 60, "a worker's port"):
        for said in (b"", b"\n", b"0" * 32 + b"\n", b"GET / HTTP/1.1\r\n\r\n"):
            with socket.create_connection(address, timeout=10) as connection:
                connection.sendall(said)
                connection.shutdown(socket.SHUT_WR)
                assert connection.recv(100) == b"", said
    system.wait(run, "COMPLETED")


def test_anonymous_caller_gets_nothing_at_any_address(system):
    """The S3 server's ports one by one: tests/rlhf_core/store/s3/test_closed_ports.py."""
    for (_, port), words in listening(system).items():
        for method in ("GET", "POST", "PUT", "DELETE"):
            for path in (*API, "/buckets/rlhf/store/x", "/rlhf/store/x", "/dir/assign"):
                status = answer(port, method, path)
                allowed = {None, 301, 307, 400, 401, 403, 404, 405}  # 3xx: to the path without //
                if "flows.api_server" in words and path.startswith("/api"):
                    allowed = {401}
                elif "flows.api_server" in words:
                    allowed |= {200}  # the pages' index, for any other path
                assert status in allowed, (words, method, path)
    assert {path: answer(system.port, "GET", path) for path in PUBLIC} == dict.fromkeys(PUBLIC, 200)


def test_wrong_login_other_names_and_other_origins_are_refused(system):
    login = system.log_in()
    user, password = login.split(":")
    for wrong in ((user, password[:-1]), (user, ""), ("", password), ("admin", "pass")):
        assert httpx.get(f"{system.url}/api/version", auth=wrong).status_code == 401
    for name in ("evil.example", f"evil.example:{system.port}", "127.0.0.1.evil.example"):
        for path in (*PUBLIC, "/api/version"):
            assert answer(system.port, "GET", path, {"Host": name}.items()) == 400
    assert answer(system.port, "GET", "/api/health", {"Host": "localhost:1"}.items()) == 200
    for origin in ("http://evil.example", "null", f"http://localhost:{system.port + 1}"):
        asked = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        for reply in (
            httpx.get(f"{system.url}/api/health", headers=asked),
            httpx.options(f"{system.url}/api/flow_runs/filter", headers=asked),
        ):
            assert "access-control-allow-origin" not in reply.headers


def test_login_is_in_no_log_argument_parameter_or_artifact(system):
    system.plan()
    run = system.wait(system.submit("seed=901"), "COMPLETED", seconds=480)
    password = system.log_in().partition(":")[2]
    s3 = (system.folder / "home/system/s3/keys.json").read_text().split('"')[7]
    for process in system.processes():
        assert password not in " ".join(process.cmdline())
    holds = {
        path.relative_to(system.folder / "home/system").as_posix()
        for path in (system.folder / "home/system").rglob("*")
        if path.is_file() and {w for w in (password, s3) if w.encode() in path.read_bytes()}
    }
    # s3/data: SeaweedFS keeps its users' keys among its own data.
    assert {h for h in holds if not h.startswith("s3/data/")} == {
        "login", "system.json", "s3/keys.json"
    }  # fmt: skip
    known = str([run, system.logs(run["id"]), system.post("/artifacts/filter"),
                 [system.logs(c["id"]) for c in system.children(run["id"])]])  # fmt: skip
    assert password not in known and s3 not in known
    assert password not in system.rlhf("up") + system.rlhf("runs", "--json")


def test_other_users_of_the_machine_cannot_enter_the_folders(system):
    home = system.folder / "home"
    for name in ("system", "system/s3", "prefect", "jobs", "runs", "cache"):
        assert stat.S_IMODE((home / name).stat().st_mode) == 0o700, name
    for name in ("login", "system.json", "server.log", "gpu.log", "supervisor.log", "s3/keys.json"):
        assert stat.S_IMODE((home / "system" / name).stat().st_mode) == 0o600, name


# --------------------------------------------------------------------------- in a browser

STEAL = """async ([url, login]) => {
    const read = async (path, options) => {
        try { return await (await fetch(url + path, options)).text() } catch { return "refused" }
    }
    const json = {"content-type": "application/json"}
    const filter = {method: "POST", headers: json, body: "{}"}
    const known = {...filter, headers: {...json, Authorization: "Basic " + btoa(login)}}
    const socket = await new Promise(resolve => {
        const opened = new WebSocket(url.replace("http", "ws") + "/api/events/out", ["prefect"])
        opened.onopen = () => opened.send(JSON.stringify({type: "auth", token: ""}))
        opened.onmessage = message => resolve(message.data)
        opened.onclose = () => resolve("refused")
    })
    return [await read("/api/deployments/filter", filter), await read("/api/health"),
            await read("/ui-settings"), await read("/api/deployments/filter", known), socket]
}"""


@pytest.fixture
def elsewhere():
    """A web site of another origin."""

    class Site(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<h1>Kittens</h1>")

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Site)
    threading.Thread(target=server.serve_forever).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_page_of_another_origin_reads_nothing_though_the_user_is_logged_in(system, page, elsewhere):  # noqa: F811
    page.goto(elsewhere)
    assert page.evaluate(STEAL, [system.url, system.log_in()]) == ["refused"] * 5
    page.goto(f"{system.url}/v2/deployments")  # the user still is
    page.get_by_text("rlhf-pipeline").first.wait_for()


@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_pages_show_nothing_before_the_login(system, stranger):  # noqa: F811
    stranger.goto(f"{system.url}/v2/deployments")
    stranger.wait_for_url(re.compile("/login"))
    stranger.get_by_placeholder("admin:pass").fill("admin:pass")
    stranger.get_by_role("button", name="Login").click()
    stranger.wait_for_timeout(2000)
    assert "/login" in stranger.url and stranger.get_by_text("rlhf-pipeline").count() == 0
