"""What learners write: of each exercise the wrong answers, and a part of the line that each must be met with.

A mistake is (message, old, new): the solution with ``old`` replaced by ``new``; with an empty ``old``, ``new`` is the
whole body of the function.
"""

MISTAKES: dict[str, list[tuple[str, str, str]]] = {
    # 00
    "nf4_levels": [
        ("evenly spaced: take quantiles", "", "return torch.linspace(-1, 1, 16)"),
        (
            "no level is exactly zero",
            "torch.cat([below, torch.zeros(1, dtype=torch.float64), above.flip(0)])",
            "torch.special.ndtri(torch.linspace(1 - 0.9677083, 0.9677083, 16, dtype=torch.float64))",
        ),
        ("the largest level must be 1", "levels / levels.max()", "levels"),
        ("you have 7 above", "return levels / levels.max()", "return -levels.flip(0) / levels.max()"),
        ("evenly from 0.5 to 0.9677083", "0.9677083", "0.99"),
        ("must ascend", "above.flip(0)", "above"),
        ("expected (16,)", "above.flip(0)]", "above.flip(0)[:7]]"),
    ],
    "quantise": [
        ("take abs before max", "blocks.abs().amax", "blocks.amax"),
        ("is a standard deviation", "blocks.abs().amax(dim=1, keepdim=True)", "blocks.std(dim=1, keepdim=True)"),
        ("nearest level", "midpoints = (levels[1:] + levels[:-1]) / 2", "midpoints = levels[1:]"),
        ("a scale of its own", "blocks.abs().amax(dim=1, keepdim=True)", "weights.abs().max().expand(8, 1)"),
        ("nearest level", "blocks / scales", "blocks"),
        ("expected (8, 1)", "return codes, scales", "return codes, scales[:, 0]"),
    ],
    "bits_per_weight": [
        ("double quantisation does away", "4 + 8 / block + 32 / (block * group)", "4 + 32 / block"),
        ("the 32-bit scale of the scales is missing", " + 32 / (block * group)", ""),
        (
            "neither bytes nor a share",
            "4 + 8 / block + 32 / (block * group)",
            "(4 + 8 / block + 32 / (block * group)) / 8",
        ),
        ("serve group × block weights", "32 / (block * group)", "32 / group"),
        ("count: 4 bits a weight", "4 + 8", "5 + 8"),
    ],
    "wilson_interval": [
        ("does not prove 100 %", "", "p = k / n; h = 1.96 * (p * (1 - p) / n) ** 0.5; return p - h, p + h"),
        ("1.645 standard errors", "rate, scale", "z = 1.645; rate, scale"),
        ("centred at k/n", "centre - half, centre + half", "rate - half, min(1, rate + half)"),
        ("its own error", "rate, scale", "z = 2.2; rate, scale"),
    ],
    # 01
    "answer_loss": [
        (
            "shift logits and labels",
            "logits[:, :-1].log_softmax(-1)\n    targets = labels[:, 1:]",
            "logits.log_softmax(-1)\n    targets = labels",
        ),
        ("mean over chats", "-picked[answers].mean()", "-((picked * answers).sum(1) / answers.sum(1)).mean()"),
        ("prompt tokens are in it", "picked[answers].mean()", "picked.mean()"),
        ("that is the sum", ".mean()", ".sum()"),
        ("log-likelihood: a loss is its negative", "-picked", "picked"),
        ("returned None: is there a return?", "return -", "-"),
    ],
    "lora_forward": [
        ("scaled by alpha: the scale", "alpha / A.shape[0] *", "alpha *"),
        ("alpha / r is missing", "alpha / A.shape[0] * update", "update"),
        ("B A, not A B", "update = (x @ A.T) @ B.T", "update = x @ (A @ B).T"),
        ("B = 0", "x @ W.T + ", ""),
        ("(alpha / r) x Aᵀ Bᵀ", "A.shape[0]", "A.shape[1]"),
    ],
    "paired_interval": [
        (
            "draw prompts once",
            "means = difference[draws].mean(dim=1)",
            "means = after[draws].mean(dim=1) - before[draws.flip(0)].mean(dim=1)",
        ),
        (
            "of the means of the draws, not of the data",
            "means.quantile(0.025), means.quantile(0.975)",
            "difference.quantile(0.025), difference.quantile(0.975)",
        ),
        ("the sign is turned", "after - before", "before - after"),
        (
            "0.025 and 0.975",
            "means.quantile(0.025), means.quantile(0.975)",
            "means.quantile(0.25), means.quantile(0.75)",
        ),
    ],
    "cohen_kappa": [
        ("share of agreement", "(agreed - chance) / (1 - chance)", "agreed"),
        ("chance agreement is one half only", "chance = a * b + (1 - a) * (1 - b)", "chance = 0.5"),
        ("one rater's rate is used twice", "first.mean(), second.mean()", "first.mean(), first.mean()"),
        ("divide by 1 - p_e", "(agreed - chance) / (1 - chance)", "agreed - chance"),
    ],
    "judge": [
        (
            "inside advice",
            "",
            'return "refuses" if any(word in answer.lower() for word in ("sorry", "can\'t", "cannot")) else "complies"',
        ),
        ("lower case", ".lower()", ""),
        ("an answer of nothing", 'return "incoherent"', 'return "complies"'),
        ("curly apostrophe", '.replace("’", "\'")', ""),
        ("verb of helping", r"\b(can't|cannot|won't|unable to) (help|assist|do|provide)\b", r"\bi (can't|cannot)"),
        ("expected refuses, complies", '"refuses" if refused else "complies"', "bool(refused)"),
    ],
    "token_kl": [
        ("KL(q ‖ p)", "p_logits.log_softmax(-1)\n    q = q_logits", "q_logits.log_softmax(-1)\n    q = p_logits"),
        ("in bits", "(p - q)).sum(-1)", "(p - q)).sum(-1) / torch.log(torch.tensor(2.0))"),
        ("a constant added to logits", "(p.exp() * (p - q))", "(p.exp() * (p_logits - q_logits))"),
        ("one for each token", ".sum(-1)", ".sum()"),
        ("sum p (log p - log q)", "p.exp()", "q.exp()"),
    ],
    # 02
    "hessian_product": [
        ("empirical Fisher's product", "flat(product)", "(gradient * (gradient @ v)).detach()"),
        ("create_graph=True", ", create_graph=True", ""),
        ("does not depend on v", "gradient @ v", "gradient @ gradient"),
        ("carries a graph", "grad(gradient @ v, params)", "grad(gradient @ v, params, create_graph=True)"),
        ("that is the gradient", "flat(product)", "gradient.detach()"),
        ("the dense Hessian's product", "flat(product)", "2 * flat(product)"),
        ("expected numbers of shape", "flat(product)", "product"),
    ],
    "ggn_product": [
        ("- p pᵀ of the softmax's Hessian is missing", "(Jv - (p * Jv).sum(1, keepdim=True))", "Jv"),
        ("divide by their number", " / len(z)", ""),
        ("belongs to a squared error", "p * (Jv - (p * Jv).sum(1, keepdim=True)) / len(z)", "Jv / len(z)"),
        (
            "uᵀGv differs from vᵀGu",
            "p * (Jv - (p * Jv).sum(1, keepdim=True))",
            "(p * Jv - (p * Jv).mean(1, keepdim=True))",
        ),
        ("not Σ Jᵀ", " / len(z)", " / 3"),
    ],
    "conjugate_gradient": [
        ("steepest descent", "square / before * direction", "0 * direction"),
        ("not conjugate", "square / before", "before / square"),
        ("relative to the length of b", "tolerance * b.norm()", "0.1"),
        ("stop there and return x", "direction @ image <= 0", "False"),
        ("count each product once", "return x, products", "return x, products + 1"),
        ("is the step rᵀr / dᵀAd?", "x = x + step * direction", "x = x - step * direction"),
        (
            "stop once the residual is small",
            "while square.sqrt() > tolerance * b.norm() and products < most",
            "for _ in range(13)",
        ),
    ],
    "hutchinson_trace": [
        (
            "probes need E[vvᵀ] = I",
            "torch.randint(0, 2, (n,), generator=generator).double() * 2 - 1",
            "torch.rand(n, generator=generator).double() - 0.5",
        ),
        ("the error of a mean is std / sqrt(probes)", " / probes**0.5", ""),
        ("not by probes", "probes**0.5", "probes"),
        ("probes of length one", "* 2 - 1", "* 2 - 1; v = v / v.norm()"),
        ("must be positive", "values.std() / probes**0.5", "0.0"),
    ],
    # 03
    "row_normalised": [
        ("the whole matrix is as long", "", "return draw * W.norm() / draw.norm()"),
        ("each column has the length", "", "return draw * W.norm(dim=0) / draw.norm(dim=0)"),
        ("direction of a row has changed", "", "return draw * W.abs()"),
        ("divide by the length of the draw's row", " / draw.norm(dim=1, keepdim=True)", ""),
        ("as long as the same row", "draw * ratio", "2 * draw * ratio"),
    ],
    "without_bowl": [
        ("add columns x² and y²", "", "return values - values.mean()"),
        ("add a column x·y", "x * x, x * y, y * y", "x * x, y * y"),
        ("add columns x and y", "ones_like(x), x, y, ", "ones_like(x), "),
        ("add a column of ones", "torch.ones_like(x), ", ""),
        ("you returned the fit", "values - (X @ coefficients)[:, 0]", "(X @ coefficients)[:, 0]"),
        ("a ripple must stay", "y * y]", "y * y, x**3]"),
    ],
    "slice_2d": [
        ("the loss at home", "theta.copy_(home + alpha * d1 + beta * d2)", "theta += alpha * d1 + beta * d2"),
        ("the weights did not come back", "    theta.copy_(home)\n", ""),
        ("transposed", "return surface", "return surface.T"),
        ("the directions are swapped", "alpha * d1 + beta * d2", "alpha * d2 + beta * d1"),
        ("loss at home + alpha", "alpha * d1", "2 * alpha * d1"),
    ],
    "subspace_overlap": [
        ("compare spaces, not columns", "", "return (U * V).sum(0).square().mean()"),
        ("columns need not be orthonormal", "torch.linalg.qr(U).Q, torch.linalg.qr(V).Q", "U, V"),
        ("that is the mean cosine", ".square()", ""),
        ("that is a determinant", "cosines.square().mean()", "cosines.square().prod()"),
        ("mean over its dimensions", ".mean()", ".sum()"),
    ],
    "unrelated_null": [
        ("leave i = j out", "block[~torch.eye(m, dtype=torch.bool)]", "block.flatten()"),
        ("matched pairs", "block[~torch.eye(m, dtype=torch.bool)]", "block.diag()"),
        (
            "you shuffled pixels",
            "torch.cat([first, second])",
            "torch.cat([first, second[:, torch.randperm(49, generator=torch.Generator().manual_seed(7))]])",
        ),
        (
            "half of the pairs are missing",
            "~torch.eye(m, dtype=torch.bool)",
            "torch.ones(m, m, dtype=torch.bool).triu(1)",
        ),
    ],
    # 04
    "leave_one_out": [
        ("the sign is turned", "full - loss", "loss - full"),
        ("not on i alone", "[j for j in range(n) if j != i]", "[i]"),
        ("needed once", "full - loss for", "fit_loss(list(range(n))) - loss for"),
        ("loss after training on all", "if j != i", "if j < i or j > i + 1"),
    ],
    "influence_scores": [
        ("the sign is turned", "-rows", "rows"),
        ("the plain dot product", "torch.linalg.solve(damped, query)", "query"),
        ("not its entries", "torch.linalg.solve(damped, query)", "(1 / damped) @ query"),
        ("λ is missing", "H + lam * torch.eye(len(H), dtype=H.dtype)", "H"),
        ("H was multiplied", "torch.linalg.solve(damped, query)", "H @ query"),
        ("in the wrong unit", "-rows", "-200 * rows"),
    ],
    "woodbury_solve": [
        ("the factor 1/λ in front", "(v - U.T @ inner) / lam", "v - U.T @ inner"),
        ("not UUᵀ + I", "lam * torch.eye", "torch.eye"),
        ("a minus belongs before", "v - U.T", "v + U.T"),
        (
            "400,000 × 400,000",
            "",
            "return torch.linalg.solve(U.T @ U + lam * torch.eye(U.shape[1], dtype=U.dtype), v)",
        ),
        ("must give v back", "U @ v)", "U @ v) / 2"),
    ],
    "auroc": [
        (
            "poison on top gives 0",
            "suspicion[poisoned][:, None] - suspicion[~poisoned][None]",
            "suspicion[~poisoned][:, None] - suspicion[poisoned][None]",
        ),
        ("they count one half", " + 0.5 * (gaps == 0).double()", ""),
        ("12 most suspicious", "", "return poisoned[suspicion.topk(int(poisoned.sum())).indices].double().mean()"),
        (
            "only the order counts",
            "",
            "return (1 + torch.corrcoef(torch.stack([suspicion, poisoned.double()]))[0, 1]) / 2",
        ),
    ],
    "datamodeling_score": [
        ("not over those left out", "row[subset].sum()", "row.sum() - row[subset].sum()"),
        (
            "only their order counts",
            "predicted.argsort().argsort(), measured.argsort().argsort()",
            "predicted, measured",
        ),
        (
            "rank within each query",
            "",
            "p = torch.stack([influences[:, s].sum(1) for s in subsets], 1); "
            "r = [x.flatten().argsort().argsort() for x in (p, losses)]; "
            "return torch.corrcoef(torch.stack(r).double())[0, 1]",
        ),
        ("not means", "row[subset].sum()", "row[subset].mean()"),
        ("correlate by one half", "torch.stack(correlations).mean()", "torch.stack(correlations).max()"),
    ],
    # 05
    "natural_step": [
        ("the safety loss rises", "-(2", "(2"),
        ("half of tau", "2 * tau", "tau"),
        ("needs a square root", "(2 * tau / (g @ direction)).sqrt()", "(2 * tau / (g @ direction))"),
        ("g was multiplied by G", "", "d = G @ g; return -d * (2 * tau / (d @ G @ d)).sqrt()"),
        ("the gradient's own direction", "", "return -g * (2 * tau / (g @ G @ g)).sqrt()"),
        ("the length of δ is bounded", "(g @ direction)", "(direction @ direction)"),
        ("mind the step's length", "-(2 * tau / (g @ direction)).sqrt() * ", "-"),
        ("at the same price", "", "d = g / G.diagonal(); return -d * (2 * tau / (d @ G @ d)).sqrt()"),
    ],
    "line_search": [
        ("0.71 of the first", "tau / 4**k", "tau / 2**k"),
        ("put the parameters back", "    theta.copy_(home)\n    return None", "    return None"),
        ("the safety loss did not fall", "safety < best and ", ""),
        ("compare the protected loss with where it STARTED", "protected - start", "protected"),
        ("return the allowance that passed", "return allowance", "return tau"),
        ("halve and try again", "range(halvings + 1)", "range(1)"),
        ("are five", "range(halvings + 1)", "range(halvings)"),
        ("return None", "    return None", "    return 0.0"),
    ],
    "orthogonal_step": [
        ("Euclidean projection", "solve(g)", "g"),
        ("has doubled", "step - across", "step + across"),
        ("divide by gᵀM⁻¹g", " / (g @ across)", ""),
        ("to first order", "(g @ step) / (g @ across)", "0.5 * (g @ step) / (g @ across)"),
    ],
    "weighted_return": [
        ("M_t θ_f belongs on the right", "task_metric @ tuned", "tuned"),
        (
            "the metrics are swapped",
            "",
            "return torch.linalg.solve(safety_metric + c * task_metric, safety_metric @ tuned)",
        ),
        ("all parameters shrink alike", "", "return tuned / (1 + c)"),
        ("does not vanish", "c * safety", "c**2 * safety"),
    ],
    "random_control": [
        ("as long as the step:", "draw * step.norm() / draw.norm()", "draw"),
        ("divide the draw by its own length", " / draw.norm()", ""),
        (
            "do not flip or permute",
            "",
            "g = torch.Generator().manual_seed(seed); return step * torch.randn(step.shape, generator=g).sign()",
        ),
        ("the same seed must give", "generator=generator, ", ""),
        ("another seed must give", "manual_seed(seed)", "manual_seed(0)"),
        (
            "it points along the step",
            "draw * step.norm() / draw.norm()",
            "(draw + step) * step.norm() / (draw + step).norm()",
        ),
    ],
    "restore": [
        ("double the allowance", "2 * tau if k == 0 else tau / 4**k", "tau / 4**k"),
        ("from the START", "log[0][1]", "log[-1][1]"),
        ("it stopped early", "range(steps)", "range(1)"),
        ("no step was taken", "range(steps)", "range(0)"),
        (
            "does not end where the parameters are",
            "log[-1][0] <= goal:\n            break",
            "log[-1][0] <= goal:\n            theta.copy_(home)\n            break",
        ),
    ],
    # 07
    "slerp": [
        ("that is the straight line", "", "return (1 - t) * a + t * b"),
        ("take the straight line there", "    if omega < 1e-6:\n        return (1 - t) * a + t * b\n", ""),
        ("divide by both lengths", "(a @ b / (a.norm() * b.norm()))", "(a @ b)"),
        (
            "t = 0 must give the first",
            "torch.sin((1 - t) * omega) * a + torch.sin(t * omega) * b",
            "torch.sin(t * omega) * a + torch.sin((1 - t) * omega) * b",
        ),
        ("t times the whole angle", "", "x = (1 - t) * a + t * b; return x / x.norm() * a.norm()"),
    ],
    "dare": [
        ("the step shrank", " / (1 - p)", ""),
        ("not by 1 / p", "/ (1 - p)", "/ p"),
        ("the share that is DROPPED", ">= p", "< p"),
        ("drew the same mask", "generator=generator", "generator=torch.Generator().manual_seed(0)"),
        ("must be delta / (1 - p)", "delta * left", "2 * delta * left"),
    ],
    "pareto_front": [
        ("more is better", "[1, 1, -1]", "[1, 1, 1]"),
        (
            "do not dominate each other",
            "((losses <= point).all(dim=1) & (losses < point).any(dim=1)).any()",
            "(losses <= point).all(dim=1).sum() > 1",
        ),
        ("wins on none", "(losses <= point).all(dim=1) & (losses < point).any(dim=1)", "(losses < point).all(dim=1)"),
        ("less is better", "[1, 1, -1]", "[1, -1, -1]"),
    ],
    "projected_update": [
        ("Frobenius norm", " / V.norm()", ""),
        ("acts from the left", "C @ update", "update @ (V.T @ V) / V.norm()"),
        ("is projected always", "projected if cosine < tau else update", "projected"),
        ("below the threshold the layer is projected", "projected if cosine < tau else update", "update"),
        ("below the threshold the layer is projected", "cosine < tau", "cosine > tau"),
    ],
    "claim_status": [
        ("is no vote", "", 'return "holds" if 2 * sum(c["holds"] for c in claims) > len(claims) else "fails"'),
        ("one seed that holds", "", 'return "holds" if any(c["holds"] for c in claims) else "fails"'),
        ("whatever its values", "", 'return "holds" if sum(c["value"] for c in claims) > 0 else "fails"'),
        ("it held at every seed", 'return "holds"', 'return "open"'),
    ],
    # 08
    "ddim_step": [
        ("that is x itself", "", "return x"),
        ("the image is not noised again", "b**0.5 * image + (1 - b) ** 0.5 * implied", "b**0.5 * image"),
        ("takes the roots of b and 1 - b", "return b**0.5 * image + (1 - b) ** 0.5", "return b * image + (1 - b)"),
        ("b = 1 must give the image", "(1 - a) ** 0.5 * noise) / a**0.5", "(1 - a) * noise) / a"),
        ("b = 1 must give the image", "x - (1 - a) ** 0.5 * noise", "x + (1 - a) ** 0.5 * noise"),
        ("mixed anew with √b and √(1 - b)", "(1 - b) ** 0.5 * implied", "(1 - b) ** 0.5 * implied * b"),
        ("left [-1, 1]: clip", ".clamp(-1, 1)", ""),
        ("compute it again from x", "(1 - b) ** 0.5 * implied", "(1 - b) ** 0.5 * noise"),
        (
            "the new noise must give x at a",
            "(x - a**0.5 * image) / (1 - a) ** 0.5",
            "noise + x - a**0.5 * image - (1 - a) ** 0.5 * noise",
        ),
    ],
    "erase_gradient": [
        ("must not fall below 0", "max(eta - cosine, 0.0)", "eta - cosine"),
        ("mind the sign of the cosine", "max(eta - cosine, 0.0)", "max(eta + cosine, 0.0)"),
        ("as in BOME", "(g_retain.norm() * g_forget.norm())", "g_forget.norm() ** 2"),
        ("depends on the gradients' lengths", " / (g_retain.norm() * g_forget.norm())", ""),
        ("at a cosine of -0.6", "max(eta - cosine, 0.0)", "max(-cosine, 0.0)"),
        ("belongs to the forgetting gradient", "g_retain + weight * g_forget", "weight * g_retain + g_forget"),
        ("g_retain + weight · g_forget", "g_retain + weight * g_forget", "weight * g_forget"),
    ],
    "hypergradient": [
        ("which pretends that θ* moves as θ does", "rho * torch.linalg.solve(shifted, tuned - goal)", "tuned - goal"),
        ("the factor ρ is missing", "return rho * ", "return "),
        ("the sign is turned", "tuned - goal", "goal - tuned"),
        ("at the tuned weights θ*, not at θ", "tuned - goal", "theta - goal"),
        ("that is ρ = 1", "shifted = ", "rho = 1.0\n    shifted = "),
        ("differs from a central difference", "solve(shifted, tuned - goal)", "solve(A, tuned - goal)"),
    ],
    "unrolled_gradient": [
        ("go back through the n steps", "", "return g"),
        (
            "is near, but not the gradient",
            "",
            "A = torch.stack([matvec(e) for e in torch.eye(5).double()]); "
            "return torch.linalg.solve(torch.eye(5).double() + n * a * A, g)",
        ),
        ("all steps at once", "", "return g - n * a * matvec(g)"),
        ("one step, one product", "range(n)", "range(n - 1)"),
        ("v - a A v", "v - a *", "v + a *"),
    ],
}
