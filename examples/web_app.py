"""Serve a model to several people at once (pip install fastapi uvicorn).

Run `python examples/web_app.py FOLDER [PORT]` and
`curl -N localhost:8000/chat --json '{"text": "What is the capital of France?"}'`.
"""

import sys

import uvicorn
from fastapi import Body, FastAPI, HTTPException
from fastapi.responses import StreamingResponse

from llama_ref import Llama, RequestError

llama = Llama.build(sys.argv[1], max_seq_len=2048)
app = FastAPI()


@app.post("/chat")  # a plain `def` runs in a thread of its own; threads may share one Llama
def chat(text: str = Body(), max_gen_len: int = Body(128), temperature: float = Body(0.6), seed: int | None = Body(None)):
    question = [{"role": "user", "content": text}]
    try:
        answer = llama.stream(question, max_gen_len=max_gen_len, temperature=temperature, seed=seed)
    except RequestError as error:  # a prompt that is too long, a temperature below 0, ...
        raise HTTPException(400, str(error)) from error
    return StreamingResponse(answer, media_type="text/plain; charset=utf-8")


uvicorn.run(app, port=int(sys.argv[2]) if len(sys.argv) > 2 else 8000)
