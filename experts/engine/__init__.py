"""The engine behind `experts.local`: one thread owns a model and decodes every request in one running batch.

Requests join and leave between steps. A step is one forward pass over a flat list of tokens: one token of each row
that is decoding, and a bounded chunk of each prompt that is being read, so nothing is padded and a long prompt cannot
hold up the others. The parts, from the outside in:

- `work` and `registry`: a request, and the adapters, on the event loop's side.
- `jobs`: what the event loop and the worker thread hand each other.
- `worker`: the thread; it runs commands between steps.
- `batch`: which rows take part in a step, and what becomes of the results; `pace` is how fast requests end.
- `rows`: one request in the batch, generating or scoring; `layout` puts the rows of a step side by side.
- `runner`: the model and one forward pass; `loading` makes it from a folder, with `facts` about it.
- `attention` and `cache`: keys and values of each row, and attention over them.
- `packed`: linear layers whose weights are laid out for small batches on a CPU.
- `lora`: adapters on the model.
- `sampling`, `text`: from logits to tokens, and between tokens and text.
"""
