"""Outside engines, each behind a script that an interpreter of its own runs: `PYTHON -I drivers/NAME.py`.

A driver imports nothing of headrace and runs on Python 3.10 or newer. `serve.py` is the loop that all share;
`convert.py` makes the files that the engines read. headrace itself is measured through the same protocol, by
`compare/own_driver.py`.

The protocol
    One JSON object a line on stdin, one answer a line on stdout; what libraries print goes to stderr. Every answer has
    `ok`; where it is false, `error` is one line, and the driver goes on.

    {"op": "load", "model": path, "precision": "q4_0", "threads": 2, "max_len": 256, "padded_len": 300,
     "max_requests": 32, "settings": {}}
        Once, first. max_len: most tokens of prompt and answer of one request; padded_len: of the longest prompt and the
        longest answer, which need not be of one request; max_requests: most requests that are computed at once, the
        others wait; settings: the engine's own, by name. The answer:
        load_s           seconds, imports included
        versions         package -> version
        weights_bytes    bytes of weights that a step of one row reads
        scheduling       "continuous": a request joins the running batch when it arrives;
                         "static": what arrives while a batch runs makes the next batch
        settings, isa    what is used; isa: what the engine says of the instructions it uses, where it says anything
        peak_rss_bytes   after loading

    {"op": "run", "requests": [{"id": "0", "token_ids": [..], "max_tokens": 128, "at_s": 0.0}],
     "sampling": {"temperature": 0, "top_p": 1, "seed": 0}, "ignore_eos": false, "eos_token_ids": [2]}
        Each request goes to the engine at_s seconds after the start (default 0); nothing is reused from an earlier run.
        Temperature 0 is greedy. With ignore_eos (the default) it yields exactly max_tokens tokens; without, it ends
        after the first of eos_token_ids, which is part of the answer, or after max_tokens. The answer:
        requests         in the order given: id, token_ids (generated), token_s (when each was in our hands, in seconds
                         from the start of the run), first_s and last_s (of them, the first and the last)
        makespan_s       start to last token of all
        cpu_s            processor time of the whole process in the run
        peak_rss_bytes   highest resident memory in the run (VmHWM), weights included

    {"op": "close"}      ends the driver, as the end of its input does.

What each engine can do
    llama_cpp      continuous; our loop over llama_decode, as its server does it; greedy, top-p
    openvino       continuous (ContinuousBatchingPipeline); greedy, top-p
    vllm_cpu       continuous; greedy, top-p
    onnxruntime    static (paged attention needs a GPU in 0.18); greedy, top-p without seed
    ctranslate2    static; prompts of different lengths are computed at once only as far as the shortest; greedy, top-p
    transformers   static, padded on the left; greedy, top-p; with a compiled decode step; or its continuous batching,
                   greedy
    In all of them a row that has ended leaves the batch, but for the compiled decode step of transformers.
"""
