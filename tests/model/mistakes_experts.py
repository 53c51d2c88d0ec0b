"""Negative controls, second half: mistakes in router, experts, MTP and losses."""

from tests.model.mistakes import mistake

ROUTER = {
    "sigmoid scores": mistake(
        "router.scores", ("F.softplus(logit_BTE.clamp_min(LEAST_LOGIT)).sqrt()", "torch.sigmoid(logit_BTE)")
    ),
    "scores without the root": mistake("router.scores", (".sqrt()", "")),
    "routing weights with the bias": mistake(
        "router.Gate.forward",
        ("route(score_BTE, expert_BTK", "route(score_BTE + (0 if self.hashed else self.bias), expert_BTK"),
    ),
    "choice without the bias": mistake("router.Gate._choose", ("score_BTE + self.bias", "score_BTE")),
    "routing weights not normalised": mistake("router.route", (" / (chosen_BTK.sum(-1, keepdim=True) + GUARD)", "")),
    "routing weights normalised over all experts": mistake("router.route", ("(chosen_BTK.sum(", "(score_BTE.sum(")),
    "scaling factor dropped": mistake("router.route", ("scaling * chosen_BTK", "chosen_BTK")),
    "hash of the next token": mistake(
        "router.Gate._choose", ("self.tid2eid[token_BT]", "self.tid2eid[token_BT.roll(-1, 1)]")
    ),
}

EXPERTS = {
    "up not clamped": mistake("experts._ClampedSwiGLU.forward", (".clamp(-limit, limit)", "")),
    "up clamped from above only": mistake(
        "experts._ClampedSwiGLU.forward", (".clamp(-limit, limit)", ".clamp(max=limit)")
    ),
    "gate not clamped": mistake("experts._ClampedSwiGLU.forward", (".clamp(max=limit)", "")),
    "gate clamped from below too": mistake(
        "experts._ClampedSwiGLU.forward", (".clamp(max=limit)", ".clamp(-limit, limit)")
    ),
    "a clamped gate has a gradient": mistake("experts._ClampedSwiGLU.backward", (".mul_(gate <= ctx.limit)", "")),
    "a clamped up has a gradient": mistake("experts._ClampedSwiGLU.backward", (".mul_(up.abs() <= ctx.limit)", "")),
    "shared expert not clamped": mistake("experts.SharedExpert.forward", ("self.limit", "1e9")),
    "gate and up exchanged": mistake("experts.Experts.forward", ("swiglu(gate_PF, up_PF", "swiglu(up_PF, gate_PF")),
    "routing weight before the clamp": mistake(
        "experts.Experts.forward",
        ("(gate_PF, up_PF, weight_P, self.limit)", "(gate_PF, up_PF * weight_P.unsqueeze(-1), None, self.limit)"),
    ),
    "results not put back in token order": mistake(
        "dispatch.LocalDispatcher.combine",
        ("dispatched.back_P, dispatched.order_P", "dispatched.order_P, dispatched.back_P"),
    ),
    "experts' gradient of the wrong rows": mistake(
        "experts._GroupedMatmul.backward", ("grad_PF.split(counts)", "grad_PF.flip(0).split(counts)")
    ),
    "shared expert dropped": mistake("moe.MoE.forward", (" + self.shared_experts(h_BTD)", "")),
}

MTP = {
    "MTP embeds token t": mistake(
        "transformer.Transformer.forward", ("token_BT[:, 1:], place", "token_BT[:, :-1], place")
    ),
    "MTP projections exchanged": mistake(
        "mtp.MTP.predict", ("self.e_proj(", "self.h_proj("), ("+ self.h_proj(", "+ self.e_proj(")
    ),
    "MTP norms exchanged": mistake(
        "mtp.MTP.predict", ("self.enorm(", "self.hnorm("), ("self.hnorm(x_", "self.enorm(x_")
    ),
    "MTP after the final norm": mistake(
        "transformer.Transformer.forward", ("predict(x_BTND[", "predict(self.norm(x_BTND)[")
    ),
    "MTP counts a document's last token": mistake(
        "transformer.Transformer.forward", ("self.place(mtp_document(document_BT)", "self.place(document_BT[:, :-1]")
    ),
    "MTP target across documents": mistake(
        "losses.mtp_target", (".masked_fill(mtp_document(document_BT) < 0, -1)", "")
    ),
    "MTP target is the next token": mistake("losses.mtp_target", ("target_BT[:, 1:]", "target_BT[:, :-1]")),
}

LOSSES = {
    "masked targets count as token 0": mistake("losses._CrossEntropySum.forward", (".masked_fill(~learned, 0)", "")),
    "masked targets have a gradient": mistake(
        "losses._CrossEntropySum.forward", ("grad_PV.mul_(learned)", "grad_PV.mul_(1)")
    ),
    "masked targets in the denominator": mistake("losses.count", ("(target_BT >= 0).sum()", "counted_BT.sum()")),
    "KL over tokens without blocks too": mistake("losses.count", ("(position_BT >= CSA_RATIO - 1)", "counted_BT")),
    "layers' terms without their weight": mistake("losses._Attach.backward", ("ctx.scale", "1.0")),
    "balance over the whole row": mistake("moe.balance_sum", (" + document_BT.clamp_min(0)", " + 0 * document_BT")),
    "balance without K": mistake("moe.balance_sum", ("K * length_G", "length_G")),
    "balance counts one expert fewer": mistake("moe.balance_sum", ("topk(K,", "topk(K - 1,")),
    "balance counts padding": mistake("moe.balance_sum", ("document_BT >= 0", "document_BT >= -1")),
    "balance counts with the bias": mistake(
        "moe.MoE._statistics", ("balance_sum(score_BTE,", "balance_sum(score_BTE + self.gate.bias,")
    ),
    "balance of scores that do not add up to 1": mistake(
        "moe.balance_sum", ("score_BTE / score_BTE.sum(-1, keepdim=True)", "score_BTE")
    ),
}
