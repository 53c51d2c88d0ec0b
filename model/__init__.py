"""DeepSeek-V4 in plain PyTorch: notation, and the map from the paper's equations to functions.

Tensor names end in shape letters, one legend for the whole project; a letter stays when its axis is sharded:

    B row         T position     D hidden            N residual stream (the paper's n_hc)
    H query head  C head channel R RoPE channel      Q query-latent channel, or query of a chunk
    G output group O group channel S compressed block M position inside a block
    W window key  Z selected slot I indexer head     J indexer channel    K chosen expert, or key of a chunk
    E expert      F expert channel P token-expert pair, or flat token     L layer    V vocabulary    X matrix of a batch
    U distinct pair of tokens

| source             | in words                                     | function                                         |
| ------------------ | -------------------------------------------- | ------------------------------------------------ |
| R 2.2              | the three mixes of an mHC site               | `model.mhc.gates`                                |
| R 2.2 eq. 8        | doubly stochastic; comb = B transposed       | `model.mhc.sinkhorn`                             |
| R 2.2              | into the layer, and back into the streams    | `model.mhc.enter`, `model.mhc.expand`            |
| R 2.3.1 eqs. 9-12  | overlapped compression, CSA                  | `model.compressor.compress_overlapped`           |
| R 2.3.1 eqs. 13-17 | index scores, top-k                          | `model.indexer.scores`, `model.indexer.select`   |
| V3.2 2.1           | the indexer's objective                      | `model.indexer.kl_sum`                           |
| R 2.3.2 eqs. 20-23 | compression, HCA                             | `model.compressor.compress`                      |
| R 2.3.3            | partial rotary embedding, inverse on outputs | `model.rope.rotate`                              |
| R eq. 27           | softmax with sink over window and entries    | `model.attend.attend`                            |
| R 3.4.3            | packed documents: what a token may see       | `model.visibility.layout`                        |
| V3 2.1.2, R 2.1    | sqrt-softplus routing, bias rule             | `model.router.route`, `model.router.update_bias` |
| V3 2.1.2           | sequence-wise balance loss                   | `model.moe.balance_sum`                          |
| R 2.1              | clamped SwiGLU experts                       | `model.experts.clamped_swiglu`                   |
| V3 2.2             | multi-token prediction                       | `model.mtp.MTP.predict`                          |
| R 3.5              | one token from the compressed cache          | `model.decode.step`                              |

R is the V4 report, V3 and V3.2 the earlier ones. `model.transformer` puts it together, `model.names` meets the
released checkpoint, `model.init` holds the initial values, `model.count` counts parameters and FLOP. `model.cache` is
what decoding remembers, `model.count_decode` what it costs, `model.efficiency` the comparison with V3.2.
"""
