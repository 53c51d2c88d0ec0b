"""Negative controls, first half: mistakes in mHC, visibility, attention, compressor, RoPE and indexer."""

from tests.model.mistakes import mistake

MHC = {
    "comb untransposed": mistake("mhc._Expand.forward", ("comb_BTNN.transpose(-1, -2)", "comb_BTNN")),
    "comb logits read column by column": mistake(
        "mhc.gates", (".unflatten(-1, (N, N))", ".unflatten(-1, (N, N)).mT.contiguous()")
    ),
    "sinkhorn rows before columns": mistake("mhc._axis", ("division % 2", "1 - division % 2")),
    "sinkhorn one round fewer": mistake("mhc._rounds", ("2 * iterations - 1", "2 * iterations - 3")),
    "sinkhorn one division more": mistake("mhc._rounds", ("2 * iterations - 1", "2 * iterations")),
    "softmax without eps": mistake("mhc._rounds", ("softmax + eps, []", "softmax, []")),
    "sums without eps": mistake("mhc._rounds", (".add_(eps)", "")),
    "pre without eps": mistake("mhc.gates", ("base_pre) + hc_eps", "base_pre)")),
    "post without the factor 2": mistake("mhc.gates", ("2 * torch.sigmoid", "torch.sigmoid")),
    "scales of pre and post exchanged": mistake(
        "mhc.gates", ("scale[0] * pre", "scale[1] * pre"), ("scale[1] * post", "scale[0] * post")
    ),
    "streams not normalised before a layer": mistake("mhc._Enter.forward", ("product * rms_inverse", "product")),
    "streams without a gradient through their mixes": mistake(
        "mhc._Enter.backward", ("(grad_product @ fn)", "(0 * grad_product @ fn)")
    ),
    "streams without a gradient through their size": mistake(
        "mhc._Enter.backward", ("rms_inverse**3", "0 * rms_inverse")
    ),
    "streams without a gradient of the layer": mistake(
        "mhc._Enter.backward", ("outputs[0].detach().unsqueeze(-1)", "0 * outputs[0].detach().unsqueeze(-1)")
    ),
    "comb's gradient transposed": mistake(
        "mhc._Expand.backward", ("torch.matmul(comb_BTNN, grad)", "torch.matmul(comb_BTNN.mT, grad)")
    ),
    "streams not normalised at the end": mistake("mhc.head", ("(product * rms_inverse)", "product")),
    "last collapse without eps": mistake("mhc.head", ("+ base) + hc_eps", "+ base)")),
    "sinkhorn backward without the divisor's gradient": mistake(
        "mhc._Sinkhorn.backward", ("(grad_NNP - mean)", "grad_NNP.clone()")
    ),
}

VISIBILITY = {
    "block visible one token early": mistake(
        "visibility._blocks", ("high_BT=high_BT,", "high_BT=high_BT + ((position_BT + 2) % m == 0),")
    ),
    "block visible one token late": mistake(
        "visibility._blocks", ("high_BT=high_BT,", "high_BT=high_BT - ends_BT.int(),")
    ),
    "blocks of earlier documents visible": mistake(
        "visibility._blocks", ("low_BT=high_BT - (position_BT + 1) // m", "low_BT=torch.zeros_like(high_BT)")
    ),
    "block grid shifted by a token": mistake("visibility._blocks", ("last_BS - (m - 1)", "(last_BS - m).clamp_min(0)")),
    "first block knows the document before": mistake("visibility._blocks", ("position_BS > 0", "position_BS >= 0")),
    "window one too wide": mistake("visibility.layout", ("max=window - 1", "max=window")),
    "window one too narrow": mistake("visibility.layout", ("max=window - 1", "max=window - 2")),
    "window into the document before": mistake(
        "visibility.layout", ("position_BT.clamp(max=window - 1)", "torch.full_like(position_BT, window - 1)")
    ),
    "window with the next token": mistake("sight.Chunk.visible_window", ("key_W <= query_Q1", "key_W <= query_Q1 + 1")),
}

ATTENTION = {
    "sink dropped": mistake("attend._weigh", (" + torch.exp(sink_H1 - max_BQH1)", "")),
    "sink contributes a value": mistake(
        "attend._weigh",
        (
            "parts = exp_BQHK.split(",
            "parts = (exp_BQHK + (total_BQH1 - exp_BQHK.sum(-1, keepdim=True)) / 9).split(",
        ),
    ),
    "sink learns in the wrong direction": mistake("attend._Attend.backward", ("grad_sink = -(", "grad_sink = (")),
    "values get no gradient of the output": mistake("attend._Attend.backward", (" + _to_keys(p, grad_BQHC, key)", "")),
    "scores not scaled": mistake("attend._scaled", (" * q_BTHC.shape[-1] ** -0.5", "")),
    "q without its norm per head": mistake(
        "attention.Attention.queries",
        ("self.norm_rotate(q_BTHC, None, self.config.rms_norm_eps, turn_T)", "self.rotate(q_BTHC, turn_T)"),
    ),
    "q latent without norm": mistake(
        "attention.Attention.queries", ("self.q_norm(self.wq_a(h_BTD))", "self.wq_a(h_BTD)")
    ),
    "kv without norm": mistake(
        "attention.Attention.keys",
        ("self.norm_rotate(self.wkv(h_BTD), self.kv_norm.weight, self.kv_norm.eps", "self.rotate(self.wkv(h_BTD)"),
    ),
    "outputs not rotated back": mistake(
        "attention.Attention.output", ("self.rotate(o_BTHC, turn_T, inverse=True)", "o_BTHC")
    ),
    "outputs rotated on": mistake("attention.Attention.output", ("inverse=True", "inverse=False")),
    "output groups interleaved": mistake(
        "attention.GroupedLinear.forward", ("(self.groups, -1))\n    return", "(-1, self.groups)).mT\n    return")
    ),
}

ROPE = {
    "RoPE on the first channels": mistake(
        "rope.rotate",
        (
            "still, turned = x.split([x.shape[-1] - 2 * pairs, 2 * pairs]",
            "turned, still = x.split([2 * pairs, x.shape[-1] - 2 * pairs]",
        ),
        ("(still, turned.to(x.dtype))", "(turned.to(x.dtype), still)"),
    ),
    "RoPE pairs half a width apart": mistake(
        "rope.rotate",
        ("unflatten(-1, (pairs, 2)).unbind(-1)", "chunk(2, -1)"),
        (
            "torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)",
            "torch.cat((even * cos - odd * sin, even * sin + odd * cos), dim=-1)",
        ),
    ),
    "entries rotated at their last token": mistake(
        "transformer.Transformer.place", ("self.turn(blocks.position_BS,", "self.turn(blocks.position_BS + r - 1,")
    ),
    "compressed layers with the window layers' theta": mistake(
        "rope.frequencies", ("config.compress_rope_theta if compressed else config.rope_theta", "config.rope_theta")
    ),
    "window layers with the compressed layers' theta": mistake(
        "rope.frequencies",
        ("config.compress_rope_theta if compressed else config.rope_theta", "config.compress_rope_theta"),
    ),
    "YaRN ramp inverted": mistake("rope._yarn_keep", ("return 1 - (", "return (")),
    "YaRN dropped": mistake("rope.frequencies", ("config.rope_scaling is None", "config.rope_scaling is not None")),
    "YaRN in window layers too": mistake("rope.frequencies", ("not compressed or ", "")),
}

COMPRESSOR = {
    "tokens of no block get a gradient": mistake("gather._Take.backward", (".masked_fill_(missing, 0)", "")),
    "tokens pick another block": mistake(
        "visibility._blocks", ("high_BT - ends_BT.int(), position_BT % m", "high_BT, position_BT % m")
    ),
    "overlap halves exchanged": mistake(
        "compressor.compress_overlapped",
        ("value_BSMC[..., :half].roll", "value_BSMC[..., half:].roll"),
        ("logit_BSMC[..., :half].roll", "logit_BSMC[..., half:].roll"),
        ("(value_before, value_BSMC[..., half:])", "(value_before, value_BSMC[..., :half])"),
        ("(logit_before, logit_BSMC[..., half:])", "(logit_before, logit_BSMC[..., :half])"),
    ),
    "a missing block before counts as zeros": mistake(
        "compressor.compress_overlapped", ("masked_fill(missing, -torch.inf)", "masked_fill(missing, 0)")
    ),
    "ape dropped": mistake("compressor.pool", (" + ape_MC", "")),
    "softmax over channels": mistake("compressor.compress", ("dim=2", "dim=3")),
    "entries without the norm's weight": mistake(
        "compressor.Compressor.finish", ("entry_BSC, self.norm.weight,", "entry_BSC, None,")
    ),
    "entries without norm": mistake("rope.norm_rotate", ("rms_normalize(x, weight, eps)", "x")),
    "norm's weight after RoPE": mistake(
        "rope.norm_rotate",
        (
            "rotate(rms_normalize(x, weight, eps), turn)",
            "(rotate(rms_normalize(x, None, eps), turn) * (1 if weight is None else weight))",
        ),
    ),
}

INDEXER = {
    "top-k over invisible blocks": mistake(
        "indexer.top",
        ("score_BQS.masked_fill(~visible_BQS, -torch.inf)", "score_BQS.clone()"),
        ("~visible_BQS.gather(-1, slot_BQZ)", "slot_BQZ < 0"),
    ),
    "one block fewer selected": mistake("indexer.select", ("min(topk, index", "min(topk - 1, index")),
    "the lowest scores selected": mistake(
        "indexer.top", ("score_BQS = score_BQS.masked", "score_BQS = (-score_BQS).masked")
    ),
    "index scores without relu": mistake(
        "indexer.scores", ("torch.relu(products(at_least_fp32(q_BQIJ), at_least_fp32(key)))", "products(q_BQIJ, key)")
    ),
    "index weights not scaled by heads": mistake("indexer.Indexer.queries", (" * self.heads**-0.5", "")),
    "index queries not rotated": mistake(
        "indexer.Indexer.queries",
        (
            "rotate(self.wq_b(qr_BTQ).unflatten(-1, (self.heads, self.dim)), turn_T)",
            "self.wq_b(qr_BTQ).unflatten(-1, (self.heads, self.dim))",
        ),
    ),
    "indexer's input not detached": mistake(
        "indexer.Indexer.forward", ("h_BTD.detach(), qr_BTQ.detach()", "h_BTD, qr_BTQ")
    ),
    "KL reversed": mistake(
        "indexer._chunk_kl",
        (
            "torch.xlogy(p_BQS, p_BQS) - p_BQS * log_q.masked_fill(~visible_BQS, 0)",
            "log_q.exp() * (log_q.masked_fill(~visible_BQS, 0) - p_BQS.clamp_min(1e-30).log())",
        ),
    ),
    "KL target not normalised": mistake(
        "indexer.target_probability",
        (" / p_BQS.sum(-1, keepdim=True).clamp_min(torch.finfo(p_BQS.dtype).tiny)", ""),
    ),
    "KL target of one head": mistake("indexer.target_probability", ("p_BQHS.sum(2)", "p_BQHS[:, :, 0]")),
    "KL target without the heads' shares": mistake(
        "indexer.target_probability", (" - target.lse_BTH[:, chunk.rows].unsqueeze(-1)", "")
    ),
    "KL of the sparse stage over all visible blocks": mistake(
        "attention.Attention._attend", ("kl_sum(index, target, sight,", "kl_sum(index, target, dense,")
    ),
    "the dense stage attends the selection": mistake(
        "attention.Attention._attend", ('if place.mode == "sparse" and', 'if place.mode != "dense" and')
    ),
    "KL counts padding": mistake("indexer._chunk_kl", (" & counted_BQ.unsqueeze(-1)", "")),
}
