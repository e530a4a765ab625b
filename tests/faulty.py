"""A server that misbehaves on demand, over real sockets."""

import collections
import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from ultramed.core.client import ServerConfig


class Faulty:
    """Answers with the last message reversed; `faults(number)` names what goes wrong with the n-th request, or None."""

    def __init__(self, faults=lambda number: None, delay=0.0, answer=lambda body: body["messages"][-1]["content"][::-1]):
        self.bodies, self.headers, self.busy, self.most, self.lock = [], [], 0, 0, threading.Lock()
        self.done = collections.Counter()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                with outer.lock:
                    number = len(outer.bodies)
                    outer.bodies.append(body)
                    outer.headers.append(dict(self.headers))
                    outer.busy += 1
                    outer.most = max(outer.most, outer.busy)
                time.sleep(delay)
                with outer.lock:  # before it is answered: the next request may be here before this thread goes on
                    outer.busy -= 1
                self.reply(faults(number), body)

            def reply(self, fault, body):
                if fault == "drop":
                    self.connection.close()
                    return
                if isinstance(fault, tuple):
                    status, text, extra = fault
                else:
                    status, extra = fault or 200, {}
                    usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
                    content = answer(body) if status == 200 else ""
                    choice = {"message": {"role": "assistant", "content": content}, "finish_reason": "stop"}
                    text = json.dumps({"choices": [choice], "usage": usage}) if status == 200 else "no"
                    outer.done[body["messages"][0]["content"]] += status == 200
                data = text.encode()
                try:
                    self.send_response(status)
                    self.send_header("content-length", str(len(data)))
                    for name, value in extra.items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(data)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client was killed

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def config(self, **more):
        given = {"url": f"http://127.0.0.1:{self.http.server_port}/v1", "model": "m", "longest_wait": 0.05, **more}
        return ServerConfig(**given)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()
