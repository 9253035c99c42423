"""How a studied model runs: instrumented forwards, parts of its layers, passes that fit in memory."""
