"""The viewer's answers over HTTP, what it refuses, and the page in a browser."""

import io
import json
import socket
import urllib.error
import urllib.request
from http.client import HTTPConnection

import numpy as np
import pytest
from PIL import Image

from saccade.apps.cli import main
from saccade.errors import ConfigError
from saccade.mil import HeatmapOptions, Slide, draw_heatmaps, load_classifier, load_scores, normalize_scores
from saccade.mil.viewer import serve
from tests import chromium
from tests.helpers import keep_artefact
from tests.mil.heatmap_folder import write_folder, write_model


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A folder with heatmaps, and a server of it."""
    root = tmp_path_factory.mktemp("viewer")
    out = write_folder(root, empty=False)
    classifier = load_classifier(write_model(root / "ga.pt"))
    draw_heatmaps(out, classifier=classifier, name="ga", heatmap=HeatmapOptions(top=0))
    with serve(out, port=0) as server:
        server.serve_in_background()
        yield server, out
        server.shutdown()


def get(server, path):
    """Return body and type."""
    with urllib.request.urlopen(server.address.rstrip("/") + path) as response:
        return response.read(), response.headers["Content-Type"]


def get_json(server, path):
    return json.loads(get(server, path)[0])


def picture(server, path):
    with Image.open(io.BytesIO(get(server, path)[0])) as image:
        return np.asarray(image).astype(int)


def test_page_and_its_parts(shown):
    server, _ = shown
    page, kind = get(server, "/")
    assert kind.startswith("text/html")
    for name in ("viewer.js", "viewer.css", "openseadragon.min.js"):
        assert name.encode() in page
        assert len(get(server, f"/{name}")[0]) > 100
    assert b"http" not in page.replace(b"http-equiv", b"")  # everything comes from this machine


def test_slides_and_facts(shown):
    server, _ = shown
    assert get_json(server, "/slides") == [{"number": 0, "id": "a"}]
    facts = get_json(server, "/slides/0")
    assert (facts["width"], facts["height"], facts["mpp"], facts["levels"]) == (900, 700, 0.5, 10)
    assert facts["maps"] == ["ga: attention", *(f"ga: branch {m}" for m in range(1, 6))]


def test_deep_zoom_tiles_join_to_the_slide(shown):
    server, out = shown
    with Slide(out.parent / "slides" / "a.tif") as slide:
        whole = slide.read(0, 0, 900, 700).astype(int)
        half = slide.read_scaled(0, 0, 900, 700, (450, 350)).astype(int)
    for level, expected in ((10, whole), (9, half)):
        rows = []
        for row in range(-(-expected.shape[0] // 256)):
            tiles = range(-(-expected.shape[1] // 256))
            rows.append(np.hstack([picture(server, f"/slides/0/zoom/{level}/{x}_{row}.jpg") for x in tiles]))
        got = np.vstack(rows)
        assert got.shape == expected.shape
        assert np.abs(got - expected).mean() < 4  # JPEG
    assert picture(server, "/slides/0/zoom/0/0_0.jpg").shape == (1, 1, 3)


def test_scores_and_overlay(shown):
    server, out = shown
    scores = load_scores(out / "attention" / "ga" / "a.h5")
    got = get_json(server, "/slides/0/maps/2")
    assert got["name"] == "branch 2"
    assert got["coords"] == scores.coords.tolist()
    np.testing.assert_allclose(got["scores"], scores.maps["branch 2"], rtol=1e-5)
    overlay = picture(server, "/slides/0/maps/2.png")
    assert overlay.shape == (700, 900, 4)
    best = int(np.argmax(normalize_scores(scores.maps["branch 2"])))
    x, y = scores.coords[best] + 10
    assert overlay[y, x, 3] == 255
    assert overlay[y, x, 0] > overlay[y, x, 2]  # red
    assert overlay[..., 3].min() == 0
    tiles = get_json(server, "/slides/0/tiles")
    assert (tiles["size"], len(tiles["coords"])) == ([128.0, 128.0], len(scores.coords))
    rings = get_json(server, "/slides/0/contours")
    assert len(rings) == 3  # two pieces, one with a hole
    assert np.max([np.max(ring, 0) for ring in rings], 0)[0] < 900


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/passwd",
        "/slides/../../etc/passwd",
        "/viewer_page/viewer.js",
        "//etc/passwd",
        "/%2e%2e/%2e%2e/etc/passwd",
        "/slides/a",
        "/slides/1",
        "/slides/-1",
        "/slides/0/maps/6",
        "/slides/0/maps/6.png",
        "/slides/0/zoom/11/0_0.jpg",
        "/slides/0/zoom/10/4_0.jpg",
        "/slides/0/zoom/10/-1_0.jpg",
        "/slides/99999999999999999999",
        "/slides/%D9%A0",
        "/slides/0/contours/",
    ],
)
def test_nothing_else_is_there(shown, path):
    server, _ = shown
    connection = HTTPConnection("127.0.0.1", server.server_port)
    connection.putrequest("GET", path, skip_host=True)
    connection.putheader("Host", f"127.0.0.1:{server.server_port}")
    connection.endheaders()
    answer = connection.getresponse()
    assert (answer.status, answer.read()) == (404, b"nothing here")
    connection.close()


def test_other_hosts_and_methods_are_refused(shown):
    server, _ = shown
    request = urllib.request.Request(server.address, headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(request)
    assert refused.value.code == 403
    refused.value.close()
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(server.address + "slides", data=b"{}")
    assert refused.value.code == 501
    refused.value.close()
    assert server.server_address[0] == "127.0.0.1"
    head = urllib.request.Request(server.address + "slides", method="HEAD")
    with urllib.request.urlopen(head) as response:
        assert response.read() == b""
        assert "default-src 'self'" in response.headers["Content-Security-Policy"]


def test_a_slide_that_went_away_is_a_message(shown):
    server, out = shown
    server.content.close()
    path = out.parent / "slides" / "a.tif"
    away = path.with_suffix(".gone")
    path.rename(away)
    try:
        with pytest.raises(urllib.error.HTTPError) as failed:
            get(server, "/slides/0")
        assert failed.value.code == 422
        assert b"is not there; say --slides" in failed.value.read()
        failed.value.close()
    finally:
        away.rename(path)
    assert get_json(server, "/slides/0")["width"] == 900


def test_tiles_without_a_model(shown, tmp_path):
    _, out = shown
    (tmp_path / "tiles").symlink_to(out / "tiles")
    with serve(tmp_path, port=0, slides=out.parent / "slides") as server:
        server.serve_in_background()
        assert get_json(server, "/slides/0")["maps"] == []
        assert get_json(server, "/slides/0/tiles")["size"] == [128.0, 128.0]
        assert get_json(server, "/slides/0/contours") == []
        server.shutdown()


def test_usage_errors(shown, tmp_path, capsys):
    _, out = shown
    assert main(["slides", "view", str(tmp_path / "no")]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert main(["slides", "view", str(tmp_path)]) == 2
    assert "names no slide that is still there" in capsys.readouterr().err
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="choose another with --port"):
            serve(out, port=taken.getsockname()[1])


@pytest.mark.slow
@pytest.mark.skipif(chromium.PROGRAM is None, reason="no Chromium on this machine (apt-get install chromium)")
def test_page_in_a_browser(shown, tmp_path, capsys):
    server, out = shown
    scores = load_scores(out / "attention" / "ga" / "a.h5")
    with chromium.Page(tmp_path / "profile") as page:
        page.call("Page.navigate", url=f"{server.address}#0,1")
        page.wait("document.readyState === 'complete' && shown.overlay !== null")
        page.wait("viewer.world.getItemAt(0).getFullyLoaded() && viewer.world.getItemAt(1).getFullyLoaded()")
        page.run("document.getElementById('grid').click()")
        left, top = scores.coords[0].tolist()
        place = f"viewer.world.getItemAt(0).imageToWindowCoordinates(new OpenSeadragon.Point({left + 20}, {top + 20}))"
        page.click(page.run(f"{place}.x"), page.run(f"{place}.y"))
        text = page.wait("(t => t.startsWith('tile') && t)(document.getElementById('info').textContent)")
        assert text.startswith(f"tile 0 at ({left}, {top})   score {scores.maps['branch 1'][0]:.6g}")
        page.run("(m => { m.value = -1; m.dispatchEvent(new Event('change')); })(document.getElementById('map'))")
        page.wait("shown.overlay === null && viewer.world.getItemCount() === 1")
        outlines = "document.querySelector('canvas.outlines')"
        drawn = f"{outlines}.getContext('2d').getImageData(0, 0, {outlines}.width, {outlines}.height).data.some(v => v)"
        assert page.run(drawn)
        page.screenshot(tmp_path / "viewer.png")
    with Image.open(tmp_path / "viewer.png") as image:
        assert image.size == (1200, 800)
    kept = keep_artefact(tmp_path / "viewer.png")
    with capsys.disabled():
        print(f"\nscreenshot of the viewer: {kept}")
