"""Negative controls of decoding: mistakes in the cache and in the step that reads it."""

from tests.model.mistakes import mistake

MISTAKES = {
    "an entry is visible one token early": mistake(
        "decode._entries", ("((now.position_B + 1) //", "((now.position_B + 2) //")
    ),
    "an entry is visible one token late": mistake(
        "decode._entries", ("((now.position_B + 1) //", "(now.position_B //")
    ),
    "selection over entries not made yet": mistake(
        "decode._entries", ("visible_BS.unsqueeze(1), min(", "torch.ones_like(visible_BS).unsqueeze(1), min(")
    ),
    "one pick fewer": mistake("decode._entries", ("min(attn.config.index_topk,", "min(attn.config.index_topk - 1,")),
    "unused picks are attended": mistake("decode._entries", ("slot_BZ >= 0", "slot_BZ >= -1")),
    "places of the window before its tokens": mistake(
        "decode._attend_token", ("<= now.position_B.unsqueeze(1)", "<= now.position_B.unsqueeze(1) + 1")
    ),
    "compressed layers with the window layers' rotation": mistake(
        "decode._attend_token", ("now.compressed_turn if attn.ratio else now.window_turn", "now.window_turn")
    ),
    "the window keeps one key too long": mistake(
        "cache.LayerCache.add_window",
        ("position_B % self.window_BWC.shape[1]", "position_B % (self.window_BWC.shape[1] - 1)"),
    ),
    "a prompt's window shifted": mistake(
        "cache.LayerCache.fill_window", ("last_B1 = (length_B - 1)", "last_B1 = (length_B - 2)")
    ),
    "entries rotated at their last token": mistake(
        "cache.Compressed.add", ("(position_B[done] - (m - 1))", "(position_B[done])")
    ),
    "the series exchanged": mistake(
        "cache.Compressed.add",
        ("(self.value_before_BMC[done], value_BMC[..., -C:])", "(self.value_before_BMC[done], value_BMC[..., :C])"),
    ),
    "the block before is the one before that": mistake(
        "cache.Compressed.add", ("self.value_before_BMC[done] = value_BMC[:, :overlap, :C]", "pass")
    ),
    "no ape on new tokens": mistake("cache.Compressed.add", (" + compressor.ape[place_B]", "")),
    "no ape on a prompt's tail": mistake("cache._projected", (" + compressor.ape[: token_BM.shape[1]]", "")),
    "a prompt's tail of the block before": mistake(
        "cache.Compressed.fill", ("(length_B // m * m)", "((length_B - 1) // m * m)")
    ),
    "a missing block before counts as zeros": mistake("cache.Compressed.fill", ("-torch.inf", "0")),
    "a prompt's block before is its own": mistake(
        "cache.Compressed.fill", ("self.value_before_BMC.shape[1]] - m", "self.value_before_BMC.shape[1]]")
    ),
    "entries as they were pooled": mistake(
        "cache.Compressed.add",
        (
            "compressor.finish(compress(values, logits), turn(first_B1), self.entry_BSC.dtype)",
            "compress(values, logits).to(self.entry_BSC.dtype)",
        ),
    ),
}
