"""Conversations: in pieces, stoppable, within the model's room; the page in a real browser, and who may use it."""

import http.client
import json
import threading
import time

import browser
import pytest

from ultramed.cli import chat
from ultramed.core.errors import ConfigError


@pytest.fixture(scope="module")
def talker(medalpaca):
    """The tiny random model, kept to whole words."""
    made = chat.Talker(medalpaca.base, max_new_tokens=24)
    texts = [made.tokenizer.decode([i]) for i in range(len(made.tokenizer))]
    made.net.generation_config.suppress_tokens = [
        i for i, text in enumerate(texts) if not (text[:1] == " " and text[1:].isalpha())
    ]
    return made


@pytest.fixture
def address(talker):
    with chat.server() as server:
        server.talker = talker
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_address
        server.shutdown()


def user(text="What is asthma?"):
    return [{"role": "user", "content": text}]


def greedy(talker, turns):
    ids = talker.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = talker.net.generate(**ids, max_new_tokens=24, do_sample=False, pad_token_id=talker.tokenizer.pad_token_id)
    return talker.tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_reply_comes_in_pieces_and_is_what_generate_gives(talker):
    pieces = list(talker.reply(user()))
    assert len(pieces) > 2
    assert "".join(pieces).strip() == greedy(talker, user()).strip()


@pytest.fixture
def endless(medalpaca, monkeypatch):
    """A model that never ends by itself, and the number of tokens that it was asked for so far."""
    talker, steps = chat.Talker(medalpaca.base, max_new_tokens=400, temperature=1.0), []
    monkeypatch.setattr(talker.net.generation_config, "eos_token_id", None)

    def step(*_):
        steps.append(1)
        time.sleep(0.01)

    talker.net.register_forward_hook(step)
    return talker, steps


def test_a_closed_reply_stops_the_model(endless):
    talker, steps = endless
    pieces = talker.reply(user())
    next(pieces)
    pieces.close()
    assert len(steps) < 100
    assert not talker._busy.locked()
    assert len(list(talker.reply(user()))) > 100


def test_old_turns_make_room_for_new_ones(talker, monkeypatch):
    long = [t for _ in range(6) for t in (*user("word " * 10), {"role": "assistant", "content": "word " * 10})]
    need = talker._ids(user()).shape[1]
    monkeypatch.setattr(talker.net.config, "max_position_embeddings", need + talker.max_new_tokens)
    assert talker._ids([*long, *user()]).tolist() == talker._ids(user()).tolist()
    with pytest.raises(ConfigError, match=f"there is room for {need}"):
        talker._ids(user("What is asthma, and " * 9))


def ask(address, body, path="/reply", host=None, kind="application/json", method="POST", length=None):
    to = http.client.HTTPConnection(*address, timeout=60)
    to.putrequest(method, path, skip_host=True)
    to.putheader("Host", host or f"127.0.0.1:{address[1]}")
    to.putheader("Content-Type", kind)
    to.putheader("Content-Length", length or str(len(body)))
    to.endheaders(body.encode())
    answer = to.getresponse()
    return answer.status, answer.read().decode()


def test_the_server_replies(talker, address):
    assert address[0] == "127.0.0.1"
    status, text = ask(address, json.dumps({"turns": user()}))
    assert status == 200
    assert text.strip() == greedy(talker, user()).strip()


@pytest.mark.parametrize(
    ("change", "status", "says"),
    [
        ({"host": "evil.example:80"}, 403, "this machine only"),
        ({"kind": "text/plain"}, 400, "JSON"),
        ({"path": "/other"}, 400, "POST /reply"),
        ({"body": "{"}, 400, ""),
        ({"body": "{}"}, 400, "turns"),
        ({"body": '{"turns": [{"role": "assistant", "content": "x"}]}'}, 400, "from the user's to the user's"),
        ({"body": '{"turns": [{"role": "user", "content": " "}]}'}, 400, "needs a text"),
        ({"length": "-1"}, 400, "JSON"),
        ({"length": "x"}, 400, "JSON"),
        ({"length": str(1 << 30)}, 400, "JSON"),
        ({"method": "GET", "path": "/../secret"}, 404, ""),
    ],
)
def test_what_the_server_refuses(address, change, status, says):
    given = {"body": json.dumps({"turns": user()}), **change}
    found = ask(address, **given)
    assert found[0] == status
    assert says in found[1]


def test_a_port_that_is_taken(address):
    with pytest.raises(ConfigError, match="--port"):
        chat.server(address[1])


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium on this machine")
def test_the_page_in_a_browser(talker, address, tmp_path):
    url = f"http://127.0.0.1:{address[1]}/"
    with browser.page(url, tmp_path / "profile") as page:
        page.until(f"document.getElementById('model').textContent == {json.dumps(talker.name)}")
        page.js("document.getElementById('text').value = 'What is asthma?'; document.getElementById('form').requestSubmit()")
        said = page.until("!document.querySelector('.busy') && document.querySelector('li.assistant')?.textContent")
        assert said.strip() == greedy(talker, user()).strip()
        turns = [*user(), {"role": "assistant", "content": said}, *user("And <b>then</b>?")]
        page.js("document.getElementById('text').value = 'And <b>then</b>?'; document.getElementById('form').requestSubmit()")
        page.until("document.querySelectorAll('li.assistant').length == 2 && !document.querySelector('.busy')")
        assert page.js("[...document.querySelectorAll('li')].at(-1).textContent").strip() == greedy(talker, turns).strip()
        assert page.js("[...document.querySelectorAll('li.user')].at(-1).textContent") == "And <b>then</b>?"
        page.screenshot(tmp_path / "page.png")
        page.js("document.getElementById('again').click()")
        assert page.js("document.querySelectorAll('li').length") == 0
        assert {u.partition("?")[0] for u in page.requested if not u.startswith("data:")} <= {url, url + "about", url + "reply"}


@pytest.mark.skipif(browser.CHROMIUM is None, reason="no Chromium on this machine")
def test_stop_keeps_what_was_said(endless, tmp_path):
    slow, steps = endless
    with chat.server() as server:
        server.talker = slow
        threading.Thread(target=server.serve_forever, daemon=True).start()
        with browser.page(f"http://127.0.0.1:{server.server_address[1]}/", tmp_path / "profile") as page:
            page.js("document.getElementById('text').value = 'Tell me'; document.getElementById('form').requestSubmit()")
            page.until("document.querySelector('li.assistant')?.textContent.length > 20")
            page.js("document.getElementById('form').requestSubmit()")
            page.until("!document.querySelector('.busy')")
            assert page.js("turns.length") == 2
            assert page.js("turns[1].content.length") > 20
        server.shutdown()
    for _ in range(100):
        if not slow._busy.locked():
            break
        time.sleep(0.1)
    assert not slow._busy.locked()
    assert len(steps) < 400


def test_a_model_is_spoken_to_as_it_was_trained(medalpaca, tmp_path, fresh_store):
    """In Alpaca's template, which has one turn, and until one of the model's own end tokens, not only the tokenizer's."""
    import json as plain
    import shutil

    from ultramed.core.schema import ModelConfig
    from ultramed.lm import models
    from ultramed.lm.templates import TEMPLATES

    folder = tmp_path / "mine"
    shutil.copytree(medalpaca.base.path, folder)
    (folder / "generation_config.json").write_text(plain.dumps({"eos_token_id": [5, 2]}))
    model = models.base_model(ModelConfig(name=str(folder), label="x", template="alpaca"))
    talker = chat.Talker(model, max_new_tokens=8)
    earlier = [*user("Hello"), {"role": "assistant", "content": "Hi."}]
    text = talker.tokenizer.decode(talker._ids([*earlier, *user()])[0])
    assert text == TEMPLATES["alpaca"].render(user(), talker.tokenizer)
    assert {2, 5} <= set(talker.net.generation_config.eos_token_id)
