"""The engine behind `experts.llamacpp`: llama.cpp decodes the rows of a running batch.

Who joins, what a step computes and where results go is `experts.engine`'s; only what lies below a forward pass is
another. The parts, from the outside in:

- `batch`: the running batch of `experts.engine`, with rows that llama.cpp's sequences and grammars ask for.
- `runner`: the model and one forward pass; `sequences` says which of llama.cpp's sequences a row has.
- `loading` makes it from a GGUF file, after `gguf` has looked at the file and `trial` has tried it elsewhere.
- `grammar`: JSON schemas, held to by llama.cpp's grammars.
- `tokenizer`: the tokenizer and the chat template in a GGUF file.
- `library`: llama-cpp-python itself, and what llama.cpp has to say.
"""
