"""Slow float64 references of every loss, in plain Python: lists, loops and math, nothing shared with gold_loss."""

import math


def softmax(z: list[float], temperature: float = 1.0) -> list[float]:
    top = max(z)
    e = [math.exp((x - top) / temperature) for x in z]
    return [x / sum(e) for x in e]


def jsd(p: list[float], q: list[float], beta: float, scale: str = "kl") -> float:
    """Eq. 1 of arXiv 2306.13649 on two laws (or on two parts of laws, completed to non-negative terms)."""

    def kl(a, b):
        return sum(x * math.log(x / y) - x + y for x, y in zip(a, b) if x > 0 or y > 0)

    def safe(law):
        return [max(x, 1e-300) for x in law]

    p, q = safe(p), safe(q)
    if beta == 0:
        return kl(p, q)
    if beta == 1:
        return kl(q, p)
    m = [beta * x + (1 - beta) * y for x, y in zip(p, q)]
    value = beta * kl(p, m) + (1 - beta) * kl(q, m)
    return value / (beta * (1 - beta)) if scale == "kl" else value


def topk_jsd(student, ids, teacher_logprobs, beta):
    q, p = softmax(student), [math.exp(x) for x in teacher_logprobs]
    q = [q[i] for i in ids]
    return jsd(p + [1 - sum(p)], q + [1 - sum(q)], beta)


def groups(span: list[int]) -> list[list[int]]:
    return [[i for i, s in enumerate(span) if s == g] for g in range(max(span) + 1)]


def chain(laws, ids, rows) -> float:
    return math.prod(laws[r][ids[r]] for r in rows)


def bins(student_laws, student_ids, student_span, teacher_laws, teacher_ids, teacher_span, sbin, tbin, n, beta):
    """[value of each span]: laws at span starts summed into bins, with the outcome "exactly this span"."""
    out = []
    for gs, gt in zip(groups(student_span), groups(teacher_span)):
        own_s, own_t = sbin[student_ids[gs[0]]], tbin[teacher_ids[gt[0]]]
        crowded = any(m.count(b) > 1 for m in (sbin, tbin) for b in (own_s, own_t))
        refine = len(gs) > 1 or len(gt) > 1 or crowded
        sides = []
        for laws, ids, rows, bin_of, own in (
            (student_laws, student_ids, gs, sbin, own_s),
            (teacher_laws, teacher_ids, gt, tbin, own_t),
        ):
            law = [0.0] * (n + 1)
            for token, p in enumerate(laws[rows[0]]):
                law[bin_of[token]] += p
            if refine:
                law[n] = chain(laws, ids, rows)
                law[own] = max(law[own] - law[n], 0.0)
            sides.append([max(x, 1e-30) for x in law])
        out.append(jsd(sides[1], sides[0], beta))
    return out


def alm(student_laws, student_ids, student_span, teacher_laws, teacher_ids, teacher_span):
    out = []
    for gs, gt in zip(groups(student_span), groups(teacher_span)):
        a, b = -math.log(chain(teacher_laws, teacher_ids, gt)), -math.log(chain(student_laws, student_ids, gs))
        out.append(a * math.log(a / b) - a + b)
    return out


def uld(student_laws, student_ids, student_span, teacher_laws, teacher_ids, teacher_span, match, weights, beta):
    out = []
    for gs, gt in zip(groups(student_span), groups(teacher_span)):
        cs, ct = chain(student_laws, student_ids, gs[:-1]), chain(teacher_laws, teacher_ids, gt[:-1])
        q, p = [cs * x for x in student_laws[gs[-1]]], [ct * x for x in teacher_laws[gt[-1]]]
        ms, mt = match or ([], [])
        us, ut = [i for i in range(len(q)) if i not in ms], [i for i in range(len(p)) if i not in mt]
        a, b = sorted((q[i] for i in us), reverse=True), sorted((p[i] for i in ut), reverse=True)
        width = max(len(a), len(b))
        rest = sum(abs(x - y) for x, y in zip(a + [0.0] * (width - len(a)), b + [0.0] * (width - len(b))))
        if not a or not b:
            rest = 0.0
        matched = jsd([p[i] for i in mt], [q[i] for i in ms], beta) if match else 0.0
        wm, wu = weights or ((len(mt) / len(p), 1 - len(mt) / len(p)) if match else (0.0, 1.0))
        out.append(wm * matched + wu * rest)
    return out


def prefix(student, teacher, text: bytes, ended: bool, beta: float):
    """[value of each used offset] of one completion.

    student, teacher: (bytes of each id, end ids, ids, laws, what `Vocabulary.closed` says of the text).
    """
    n = len(text)

    class Model:
        def __init__(self, token_bytes, ends, ids, laws, closed):
            self.known, self.tells, self.broken = closed
            self.token_bytes, self.ends, self.laws = token_bytes, ends, laws
            self.at, self.path = [0], [1.0]  # boundaries and the probability of the path up to them
            for row, i in enumerate(ids):
                self.at.append(self.at[-1] + len(token_bytes[i] or b""))
                self.path.append(self.path[-1] * laws[row][i])
            self.rows = len(ids)
            self.boundaries = set(self.at)

        def starts_with(self, row, piece, strictly=False):
            return sum(
                p
                for p, b in zip(self.laws[row], self.token_bytes)
                if b and b.startswith(piece) and not (strictly and b == piece)
            )

        def F(self, target: bytes):
            """P(text starts with target), over the path and one covering token."""
            return sum(
                self.path[j] * self.starts_with(j, target[self.at[j] :])
                for j in range(self.rows)
                if self.at[j] < len(target)
            )

        def end(self, k):
            row = max(j for j in range(self.rows) if self.at[j] == k)
            return self.path[row] * sum(self.laws[row][e] for e in self.ends)

        def total(self, k):
            """What continues past offset k."""
            inside = sum(
                self.path[j] * self.starts_with(j, text[self.at[j] : k], strictly=k in self.boundaries)
                for j in range(self.rows)
                if self.at[j] < k
            )
            for j in range(self.rows):
                if self.at[j] == k:
                    some = sum(p for i, p in enumerate(self.laws[j]) if self.token_bytes[i] or i in self.ends)
                    inside += self.path[j] * some
            return inside

    models = [Model(*student), Model(*teacher)]
    known = [k for k in range(n + 1) if all(m.known[k] for m in models)]
    values = []
    for i, k in enumerate(known):
        if k == n and not ended:
            break
        full = all(k in m.boundaries for m in models)
        told = [b for b in range(256) if all(m.tells[k, b] for m in models)]
        after = known[i + 1] if i + 1 < len(known) else n + 1 if ended else None
        leap = k < n and text[k] not in told and after is not None
        leap = leap and all(m.broken[k] == m.broken[min(after, n)] for m in models)
        laws = []
        for m in models:
            law = [m.F(text[:k] + bytes([b])) for b in told] + ([m.end(k)] if full else [])
            if leap:
                law.append(m.F(text[:after]) if after <= n else m.end(n))
            laws.append([x / m.total(k) for x in law])
        both = [i for i in range(len(laws[0])) if laws[0][i] > 0 and laws[1][i] > 0]
        laws = [[law[i] for i in both] + [max(1 - sum(law[i] for i in both), 1e-12)] for law in laws]
        values.append(jsd(laws[1], laws[0], beta))
    return values
