"""Serve a model to several people at once.

    pip install fastapi uvicorn
    python examples/web_app.py FOLDER [PORT]
    curl -N localhost:8000/chat --json '{"text": "What is the capital of France?"}'

Threads may share one Llama: FastAPI runs a plain `def` in a separate thread, and an answer does not
depend on the others being generated. Give a seed to get the same sampled answer again.
"""

import sys

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from llama_ref import Llama, RequestError


class Question(BaseModel):
    text: str
    max_gen_len: int = 128
    temperature: float = 0.6
    seed: int | None = None


def make_app(llama: Llama) -> FastAPI:
    app = FastAPI()

    @app.post("/chat")
    def chat(question: Question) -> StreamingResponse:
        options = question.model_dump(exclude={"text"})
        try:
            answer = llama.stream([{"role": "user", "content": question.text}], **options)
        except RequestError as error:  # a prompt that is too long, a temperature below 0, ...
            raise HTTPException(400, str(error)) from error
        return StreamingResponse(answer, media_type="text/plain; charset=utf-8")

    return app


if __name__ == "__main__":
    folder, port = sys.argv[1], int(sys.argv[2]) if len(sys.argv) > 2 else 8000
    uvicorn.run(make_app(Llama.build(folder, max_seq_len=2048)), port=port)
