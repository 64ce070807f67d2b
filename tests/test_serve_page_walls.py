"""The chat page: what a model writes does nothing in it, its policy, and whom it is legible and usable for."""

import base64
import fnmatch
import hashlib
import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from page_server import MARKUP, Fake, Tab, browsed, browser, opened, running

from mlxgpt.common.serve.page.page import HERE, page

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def fake() -> Fake:
    return Fake()


@pytest.fixture(scope="module")
def address(fake: Fake) -> Iterator[str]:
    with running(fake.app()) as url:
        yield url


@pytest.fixture(scope="module")
def started() -> Iterator[Any]:
    with browser() as chromium:
        yield chromium


@pytest.fixture
def tab(fake: Fake, address: str, started: Any) -> Iterator[Tab]:
    fake.reset()
    with opened(started, address) as made:
        yield made


ATTACKS = [
    "<script>hit(1)</script>",
    "<img src=x onerror=hit(1)>",
    "<img src=https://evil.example/a.png>",
    "![x](https://evil.example/b.png)",
    "![x](x \"t' onerror='hit(1)\")",
    "[x](javascript:hit(1))",
    "[x](JaVaScRiPt&#58;hit(1))",
    "[x](&#x6A;avascript:hit(1))",
    "[x](data:text/html,<script>hit(1)</script>)",
    "[x](vbscript:hit(1))",
    "<javascript:hit(1)>",
    "[x](ftp://evil.example/d) [x](/v1/models) [x](#talk) [x](blob:https://evil.example/e) [x](//evil.example/f)",
    "[x](https://a.example \"\" onmouseover=hit(1))",
    "<svg onload=hit(1)><animate onbegin=hit(1) attributeName=x></svg>",
    "<math><mtext><table><mglyph><style><!--</style><img title=\"--&gt;&lt;img src=1 onerror=hit(1)&gt;\">",
    "<math><mi//xlink:href=\"data:x,<script>hit(1)</script>\">",
    "<svg></p><style><a id=\"</style><img src=1 onerror=hit(1)>\">",
    "<noscript><p title=\"</noscript><img src=x onerror=hit(1)>\">",
    "<form><math><mtext></form><form><mglyph><style></math><img src onerror=hit(1)>",
    "<iframe srcdoc='<script>parent.hit(1)</script>'></iframe><object data=x></object><embed src=x>",
    "<a href=javascript:hit(1)>x</a><base href=https://evil.example/><meta http-equiv=refresh content=0;url=https://evil.example>",
    "<link rel=stylesheet href=https://evil.example/a.css><style>@import 'https://evil.example/b.css'</style>",
    "<p style=\"background:url(https://evil.example/c.png)\">x</p>",
    "<form action=https://evil.example><button>x</button></form><input autofocus onfocus=hit(1)>",
    "<details open ontoggle=hit(1)>x</details><video><source onerror=hit(1)></video>",
    "`<img src=x onerror=hit(1)>`\n\n```html\n<script>hit(1)</script>\n```",
    "| <img src=x onerror=hit(1)> |\n|---|\n| [x](javascript:hit(1)) |",
    "<x id=talk name=form onclick=hit(1)>clobber</x><a id=say href=x>y</a>",
    "\u0000<scr\u0000ipt>hit(1)</script> <!--><img src=x onerror=hit(1)>-->",
]  # fmt: skip


@browsed
def test_what_a_model_writes_can_do_nothing(tab: Tab, fake: Fake, tmp_path: Path) -> None:
    tab.page.evaluate("() => { window.hits = 0; window.hit = () => window.hits++ }")
    path = tmp_path / "talk.json"
    turns = [({"role": "user", "content": one}, {"role": "assistant", "content": one}) for one in ATTACKS]
    path.write_text(json.dumps({"messages": [message for turn in turns for message in turn]}))
    tab.page.set_input_files("#file", path)
    tab.page.wait_for_selector(f"li:nth-child({2 * len(ATTACKS)})")
    fake.say = lambda _: "\n\n".join(ATTACKS)
    tab.send("Say all")
    tab.click("Tokens")
    tab.click("Tokens")
    tab.page.hover("li:last-child .text")
    # every beginning of an answer is drawn while it grows
    tab.page.evaluate(
        """text => {
        const writer = new Markdown(document.querySelector('#talk .text').appendChild(document.createElement('div')));
        for (let end = 0; end < text.length; end += 5) writer.show(text.slice(0, end));
    }""",
        "\n\n".join(ATTACKS),
    )
    inside = tab.page.evaluate("""() => [...document.querySelectorAll('#talk .text *, #talk .bubble *')].flatMap(one =>
        [one.localName, ...[...one.attributes].map(a => a.name)])""")
    drawn = "div p a em strong code pre table thead tbody tr th td br hr button span"
    attributes = "class title target rel tabindex type data-place href aria-describedby"
    allowed = {*drawn.split(), *attributes.split()}
    assert set(inside) <= allowed
    assert tab.page.evaluate("window.hits") == 0
    of_link = "a => [a.getAttribute('href') ?? '', a.target, a.rel]"
    links = tab.page.evaluate(f"[...document.querySelectorAll('#talk a')].map({of_link})")
    assert all(rest == ["_blank", "noopener noreferrer"] for _, *rest in links) and len(links) > 4
    assert {href.split("//")[0] for href, *_ in links} <= {"https:", ""}
    # the list can do harm where nothing is cleaned: the browser's own rule is the second wall
    walls = tab.page.evaluate("""() => { try { document.createElement('p').innerHTML = '<b>'; return '' }
        catch (error) { return error.name } }""")
    assert walls == "TypeError"
    tab.said[:] = [line for line in tab.said if "TrustedHTML" not in line]


@browsed
def test_markdown_is_drawn_and_finished_blocks_stay(tab: Tab, fake: Fake) -> None:
    fake.say = lambda _: MARKUP
    tab.send("Show")
    for selector, text in {"em": "first", "strong": "strong", "li >> nth=1": "Two", "td >> nth=0": "1"}.items():
        assert tab.page.inner_text(f".text {selector}") == text
    assert tab.page.inner_text(".text pre").strip() == "x = 1" and "5 < 6 & 7." in tab.texts()[0]
    same = tab.page.evaluate("""() => {
        const element = document.createElement('div'), writer = new Markdown(element);
        let text = '';
        for (let n = 0; n < 50; n++) writer.show(text += `Paragraph ${n}.\\n\\n`);
        const first = element.firstChild;
        for (let n = 0; n < 50; n++) writer.show(text += 'more ');
        const kept = first === element.firstChild;
        writer.show('short');
        return [kept, element.textContent.trim()];
    }""")
    assert same == [True, "short"]


@browsed
def test_it_is_used_with_a_keyboard_alone(tab: Tab, fake: Fake) -> None:
    page = tab.page
    assert page.evaluate("document.activeElement.id") == "say"
    page.keyboard.type("First")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("second")
    page.keyboard.press("Enter")
    tab.wait()
    assert fake.bodies[0]["messages"][0]["content"] == "First\nsecond"
    assert page.evaluate("document.activeElement.id") == "say"
    assert tab.texts("#status") == tab.texts()  # said once, when it is complete
    reached = []
    page.focus(".skip")
    for _ in range(25):
        if page.evaluate("document.activeElement === document.body"):
            break
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        shown = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert shown != "none" or reached[-1] == "say", reached[-1]
        page.keyboard.press("Tab")
    order = [
        "model",
        "other",
        "new",
        "save",
        "load",
        "adjust",
        "scroll",
        "Edit",
        "Copy",
        "Tokens",
        "Regenerate",
        "say",
        "send",
    ]
    places = [reached.index(name) for name in order]
    assert places == sorted(places)
    page.focus("#adjust")
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "close"
    page.keyboard.press("Escape")
    assert page.locator("#settings").is_hidden()
    unnamed = page.evaluate("""() => [...document.querySelectorAll('input, select, textarea, button')].filter(one =>
        !(one.labels?.length || one.getAttribute('aria-label') || one.textContent.trim())).map(one => one.outerHTML)""")
    assert not unnamed


@browsed
def test_a_phone_shows_all_without_scrolling_sideways(fake: Fake, address: str, started: Any) -> None:
    fake.reset()
    fake.say = lambda _: MARKUP.replace("x = 1", "x = " + "1" * 200) + "\n\n" + "w" * 300
    tab = Tab(started, address, viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    tab.page.select_option("#other", "tuned")
    tab.send("u" * 300)

    def wide() -> list[str]:
        return tab.page.evaluate("""() => [...document.querySelectorAll('body *')].filter(one => {
            const { left, right } = one.getBoundingClientRect();
            const scrolls = one.closest('.code, .scrolls, .away, .skip');
            return one.checkVisibility() && !scrolls && (right > 390.5 || left < -0.5);
        }).map(one => one.className || one.localName)""")

    assert tab.page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [390, 390] and not wide()
    boxes = [side.bounding_box() for side in tab.page.locator(".side").all()]
    assert boxes[0]["x"] == boxes[1]["x"]  # below each other
    tab.page.locator(".text strong").first.scroll_into_view_if_needed()
    tab.page.tap(".text strong >> nth=0")
    assert tab.page.locator("#tip").is_visible() and not wide()
    tab.page.tap("#adjust")
    assert tab.page.evaluate("[document.documentElement.scrollWidth, innerWidth]") == [390, 390] and not wide()
    tab.context.close()


def luminance(color: str) -> float:
    parts = [int(color[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_text_has_the_contrast_of_aa_in_both_themes() -> None:
    themes = re.findall(r":root \{(.*?)\}", (HERE / "style.css").read_text(), re.DOTALL)[:2]
    assert len(themes) == 2
    for theme in themes:
        color = {name: value if len(value) == 7 else "#" + "".join(2 * sign for sign in value[1:])
                 for name, value in re.findall(r"--([\w-]+): (#\w+);", theme) if len(value) < 9}  # fmt: skip
        pairs = [(ink, back) for ink in ("ink", "soft", "main") for back in ("paper", "panel", "code", "mine")]
        pairs += [("on-main", "main"), ("bad", "bad-back"), *[("level-ink", f"level{n}") for n in range(1, 5)]]
        for ink, back in pairs:
            light, dark = sorted((luminance(color[ink]), luminance(color[back])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 4.5, (ink, back)
        for edge in ("edge", "focus"):
            light, dark = sorted((luminance(color[edge]), luminance(color["paper"])), reverse=True)
            assert (light + 0.05) / (dark + 0.05) >= 3, edge


def test_the_policy_allows_the_scripts_of_the_page_and_no_others() -> None:
    html, headers = page()
    text = html.decode()
    policy = dict(part.split(" ", 1) for part in headers["Content-Security-Policy"].split("; "))
    for tag in ("script", "style"):
        inside = re.findall(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(each.encode()).digest()).decode()}'" for each in inside]
        assert policy[f"{tag}-src"].split() == hashes and len(hashes) == {"script": 9, "style": 1}[tag]
    assert policy["default-src"] == policy["form-action"] == policy["frame-ancestors"] == policy["base-uri"] == "'none'"
    assert policy["connect-src"] == "'self'" and "unsafe" not in str(policy) and "http" not in str(policy)
    outside = re.sub(r"<(script|style)>.*?</\1>", "", text, flags=re.DOTALL)
    assert not re.search(r"\son\w+=|\sstyle=|<script[^>]|<link rel=\"(?!icon)|(?:src|href)=\"(?!data:|#)", outside)


def test_vendored_scripts_are_those_of_the_registry() -> None:
    sums = dict(line.split()[::-1] for line in (HERE / "vendor/SHA256SUMS").read_text().splitlines())
    assert set(sums) == {path.name for path in (HERE / "vendor").glob("*.js")}
    for name, digest in sums.items():
        assert hashlib.sha256((HERE / "vendor" / name).read_bytes()).hexdigest() == digest, name
    readme = (HERE / "vendor/README.txt").read_text()
    for name, version in {"marked": "18.2.1", "DOMPurify": "3.5.0"}.items():
        script = next(path for path in (HERE / "vendor").glob("*.js") if name in path.read_text()[:200])
        assert version in script.read_text()[:200] and f"{name} {version}" in readme
        assert (HERE / f"vendor/LICENSE.{name.lower()}").stat().st_size > 1000


def test_a_wheel_takes_the_files_of_the_page() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert "mlxgpt" in project["tool"]["hatch"]["build"]["targets"]["wheel"]["only-include"]
    # which leaves out what git ignores
    ignored = [line.strip("/") for line in (ROOT / ".gitignore").read_text().split() if not line.startswith("#")]
    for path in HERE.rglob("*"):
        if "__pycache__" not in path.parts:
            parts = path.relative_to(ROOT).parts
            assert not [one for one in ignored for part in parts if fnmatch.fnmatch(part, one)], path
