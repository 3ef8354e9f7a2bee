"""Finds private keys and the API keys of common services: the patterns of detect-secrets, and newer ones beside them.

Only its patterns are used: nothing is verified with a service, and nothing that is merely random or called a password.
"""

import re
from functools import cache
from typing import Any

# Forms that detect-secrets 1.5 does not know, by service.
_NEWER = {
    "OpenAI API key": r"\bsk-(?:proj|svcacct|admin|None)-[\w-]{20,}|\bsk-[A-Za-z0-9]{48}\b",
    "Anthropic API key": r"\bsk-ant-[\w-]{20,}",
    "OpenRouter API key": r"\bsk-or-v1-[0-9a-f]{32,}",
    "Google API key": r"\bAIza[\w-]{35}(?![\w-])",
    "Google OAuth secret": r"\bGOCSPX-[\w-]{28}",
    "Hugging Face token": r"\bhf_[A-Za-z0-9]{30,40}\b",
    "GitHub token": r"\bgithub_pat_[A-Za-z0-9]{22}_[A-Za-z0-9]{59}",
    "npm token": r"\bnpm_[A-Za-z0-9]{36}\b",
    "Slack token": r"\bxox[abeoprs](?:\.xox[bp])?-(?:\d+-)?[A-Za-z0-9-]{20,}|\bxapp-\d-[A-Z0-9]+-\d+-[a-f0-9]{32,}",
    "Stripe key": r"\b(?:sk|rk)_(?:live|test)_[A-Za-z0-9]{16,}|\bwhsec_[A-Za-z0-9]{24,}",
    "Shopify token": r"\bshp(?:at|ca|pa|ss)_[a-fA-F0-9]{32}\b",
    "DigitalOcean token": r"\bdo[opr]_v1_[a-f0-9]{64}\b",
    "Databricks token": r"\bdapi[a-f0-9]{32}\b",
    "Replicate token": r"\br8_[A-Za-z0-9]{37}\b",
    "Groq API key": r"\bgsk_[A-Za-z0-9]{40,}",
    "private key": r"-----BEGIN (?:[A-Z0-9]+ )*PRIVATE KEY(?: BLOCK)?-----",
}
# Without one of these a text holds no pattern of either list: a cheap look at most texts.
_HINT = re.compile(
    r"PRIVATE KEY|PuTTY-User|A3T|A[BKS]IA|ACCA|gh[oprsu]_|github_pat_|gl[a-z]{2,5}-|GR1348941|sk-|[rs]k_|whsec_|"
    r"xox[a-s]|xapp-|hooks\.slack|SG\.|AIza|GOCSPX|hf_|npm_|authToken|pypi-Ag|eyJ|AC[a-z0-9]{32}|SK[a-z0-9]{32}|-us\d|sq0csp|"
    r"AccountKey=|shp[acps]|do[opr]_v1|dapi|r8_|gsk_|\d{8}:|[MNO][\w-]{23,25}\.|aws.{0,20}?['\"]", re.IGNORECASE)
_LONG_WORD = re.compile(r"(\S{4000})\S+")  # no key is longer, and some patterns take the square of a word's length
_PLACEHOLDER = re.compile(r"example|your|xxxx|placeholder|redacted|\.\.\.|\*\*\*|insert|changeme", re.IGNORECASE)
MIN_CHARS = 20  # of the shortest key; most texts have no word as long
MIN_DISTINCT = 5  # different characters of a key; fewer stand for one


@cache
def _patterns() -> list[tuple[str, re.Pattern[str]]]:
    from detect_secrets.plugins import (
        aws,
        azure_storage_key,
        discord,
        github_token,
        gitlab_token,
        jwt,
        mailchimp,
        npm,
        openai,
        private_key,
        pypi_token,
        sendgrid,
        slack,
        square_oauth,
        stripe,
        telegram_token,
        twilio,
    )

    plugins: list[Any] = [
        aws.AWSKeyDetector, azure_storage_key.AzureStorageKeyDetector, discord.DiscordBotTokenDetector,
        github_token.GitHubTokenDetector, gitlab_token.GitLabTokenDetector, jwt.JwtTokenDetector,
        mailchimp.MailchimpDetector, npm.NpmDetector, openai.OpenAIDetector, private_key.PrivateKeyDetector,
        pypi_token.PypiTokenDetector, sendgrid.SendGridDetector, slack.SlackDetector,
        square_oauth.SquareOAuthDetector, stripe.StripeDetector, telegram_token.TelegramBotTokenDetector,
        twilio.TwilioKeyDetector]
    known = [(plugin.secret_type, pattern) for plugin in plugins for pattern in plugin.denylist]
    return [*((name, re.compile(pattern)) for name, pattern in _NEWER.items()), *known]


def secrets_in(text: str) -> list[str]:
    """The secrets in a text as "service or kind, first characters ...", without those that stand for one.

    Of overlapping ones the first pattern's.
    """
    if ("PRIVATE KEY" not in text and max(map(len, text.split()), default=0) < MIN_CHARS) or not _HINT.search(text):
        return []
    text = _LONG_WORD.sub(r"\1 ", text)
    found: list[tuple[int, str]] = []
    taken: list[tuple[int, int]] = []
    for name, pattern in _patterns():
        for match in pattern.finditer(text):
            start, end = match.span()
            if any(start < other_end and other < end for other, other_end in taken) or _stands_for_one(match, name):
                continue
            taken.append((start, end))
            found.append((start, f"{name}, {match.group()[:8]}..."))
    return [item for _, item in sorted(found)]


def _stands_for_one(match: re.Match[str], name: str) -> bool:
    """Whether a match is a placeholder, or a word that only has the form of a key."""
    key = match.group()
    if "private key" in name.lower():  # in prose a header without a key is no secret
        rest = match.string[match.end():match.end() + 80].strip("- \n\r\\n")
        return not re.match(r"(?:\S*: .*\n+)*[A-Za-z0-9+/=]{16}", rest)
    if name == "JSON Web Token" and key.count(".") < 2:
        return True
    return bool(_PLACEHOLDER.search(key)) or len(set(key[4:])) < MIN_DISTINCT
