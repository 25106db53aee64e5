"""From a network and a list of objectives to a fitted brain encoder.

A fit goes through `network_config` (settings), `network_encoder` (what comes before and after the loop), `feed` and
`batches`, `model` (network and objectives in one module), `loop`, `optimisation`, and `fitted` (prediction and files).
"""
