"""The page's texts in its languages: (English, Chinese) by key."""

from __future__ import annotations

LANGUAGES = {"en": "English", "zh": "中文"}

TEXTS = {
    "title": ("Compare models", "模型对比"),
    "intro": (
        "Send two or more models the same message and vote for the better reply, or rate each "
        "reply on its own. Who said what is shown after the vote. To train on votes, set "
        "`data.preference.source: playground-votes`; on ratings, "
        "`data.unpaired.source: playground-thumbs`.",
        "向两个或多个模型提出同一个问题，为更好的回答投票，或单独评价每个回答；投票后才显示各回答来自哪个模型。"
        "设置 `data.preference.source: playground-votes`（投票）或 "
        "`data.unpaired.source: playground-thumbs`（评价）后，下一次训练即可使用。",
    ),
    "language": ("Language", "语言"),
    "run": ("Run", "训练任务"),
    "models": ("Models (at most {most})", "模型（最多 {most} 个）"),
    "model": ("Model {letter}", "模型 {letter}"),
    "blind": (
        "Blind votes: models in a random order, names and scores hidden until the vote",
        "盲评：模型随机排列，投票前不显示名称和分数",
    ),
    "refresh": ("Refresh models", "刷新模型列表"),
    "settings": ("Settings", "设置"),
    "length": ("Max new tokens", "最大生成长度（词元）"),
    "temperature": ("Temperature (0: greedy)", "温度（0：贪心解码）"),
    "top_p": ("Top-p", "Top-p（核采样）"),
    "system": ("System message", "系统消息"),
    "common": (
        "All models continue from the better reply (otherwise each from its own)",
        "所有模型都从更好的回答继续对话（否则各自继续）",
    ),
    "message": ("Your message", "你的消息"),
    "ask": ("Send", "发送"),
    "stop": ("Stop", "停止"),
    "new": ("New conversation", "新对话"),
    "examples": ("Examples", "示例"),
    "left": ("← Left is better", "← 左边更好"),
    "right": ("Right is better →", "右边更好 →"),
    "best": ("↑ This one is best", "↑ 这个最好"),
    "tie": ("Equally good", "一样好"),
    "both_bad": ("Both are bad", "都不好"),
    "all_bad": ("All are bad", "都不好"),
    "up": ("👍 Good", "👍 好"),
    "down": ("👎 Bad", "👎 不好"),
    "waiting": ("Loading the model …", "正在加载模型……"),
    "generating": ("…", "……"),
    "no_text": ("(empty reply)", "（空回答）"),
    "score": ("Reward {score:+.3f}", "奖励分 {score:+.3f}"),
    "no_score": ("No score: {error}", "没有评分：{error}"),
    "dropped": (
        "The oldest {count} turns no longer fit the model's context.",
        "最早的 {count} 轮对话已超出模型的上下文长度。",
    ),
    "failed": ("⚠ This model cannot reply: {error}", "⚠ 该模型无法回答：{error}"),
    "saved": (
        "Saved: {name} was better. Votes in the store: {count}.",
        "已保存：{name} 更好。存储库中现有 {count} 条投票。",
    ),
    "undecided_saved": (
        "Saved: {verdict}. Votes in the store: {count}. Such a vote is counted; it trains nothing.",
        "已保存：{verdict}。存储库中现有 {count} 条投票。这类投票只计数，不用于训练。",
    ),
    "agreement": (
        "The reward model prefers the reply that was voted for: {accuracy:.0%} "
        "(95 % interval: {low:.0%} to {high:.0%}; pairs: {n}).",
        "奖励模型与投票意见一致：{accuracy:.0%}"
        "（95% 置信区间：{low:.0%} 至 {high:.0%}；回答对数：{n}）。",
    ),
    "no_agreement": (
        "No votes yet on replies that this run's reward model has scored.",
        "还没有对本次训练的奖励模型评过分的回答投票。",
    ),
    "not_saved": ("⚠ The vote was not saved: {error}", "⚠ 投票未能保存：{error}"),
    "thumb_saved": (
        "Saved: a {verdict} reply of {name}. Rated replies in the store: {count}.",
        "已保存：{name} 的回答{verdict}。存储库中现有 {count} 条单独评价。",
    ),
    "good": ("good", "好"),
    "bad": ("bad", "不好"),
    "thumb_not_saved": ("⚠ The rating was not saved: {error}", "⚠ 评价未能保存：{error}"),
    "store": ("⚠ The store cannot be read: {error}", "⚠ 无法读取存储库：{error}"),
    "no_models": (
        "This store has no models yet. Train some with `rlhf run --preset demo`.",
        "存储库中还没有模型；运行 `rlhf run --preset demo` 即可训练。",
    ),
    "pick": ("Select at least one model.", "请至少选择一个模型。"),
    "obstacle_failed": (
        "No vote possible: fewer than two models replied.",
        "无法投票：回答成功的模型不足两个。",
    ),
    "obstacle_diverged": (
        "No vote possible: the models have different conversations, so their replies do not form "
        "a pair. Start a new conversation, or let all models continue from the better reply.",
        "无法投票：各模型的对话内容已不同，回答不能配对。请开始新对话，"
        "或让所有模型从更好的回答继续。",
    ),
    "obstacle_identical": (
        "No vote possible: the replies are identical.", "无法投票：回答完全相同。"
    ),
    "obstacle_empty": ("No vote possible: a reply is empty.", "无法投票：有回答为空。"),
}  # fmt: skip

EXAMPLES = [
    "How are you today?",
    "Tell me something nice about rainy days.",
    "Explain in two sentences why the sky is blue.",
    "你好！你会做什么？",
    "用一句话鼓励正在学习编程的人。",
]


def translate(language: str, key: str, **values: object) -> str:
    """A text in a language, with its placeholders filled in; English for an unknown language."""
    english, chinese = TEXTS[key]
    return (chinese if language == "zh" else english).format(**values)


def language_of(accepted: str) -> str:
    """The language for a browser's Accept-Language header."""
    first = accepted.split(",")[0].strip().lower()
    return "zh" if first.startswith("zh") else "en"
