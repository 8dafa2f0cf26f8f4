"""HTML with text escaped by its type: a str is escaped, Markup is not."""

import html
import unicodedata

_HIDDEN = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}  # categories that are invisible or move other characters
_JOINERS = "\u200c\u200d"  # within words of Persian, and within emoji: harmless and needed


class Markup(str):
    """HTML; any other string is text."""

    __slots__ = ()


def element(name: str, *children: str, **attributes: str | None) -> Markup:
    """One element; None leaves an attribute out: element("td", "a < b", class_="n") -> <td class="n">a &lt; b</td>."""
    given = "".join(
        f' {key.strip("_")}="{html.escape(value)}"' for key, value in attributes.items() if value is not None
    )
    return Markup(f"<{name}{given}>{join(*children)}</{name}>")


def join(*children: str) -> Markup:
    return Markup("".join(child if isinstance(child, Markup) else html.escape(child) for child in children))


def visible(text: str) -> Markup:
    r"""Text from an output: an invisible or direction-changing character (\x1b, U+202E) is shown as its escape."""
    parts: list[str] = []
    for character in text:
        if unicodedata.category(character) in _HIDDEN and character not in "\n\t" + _JOINERS:
            parts.append(element("i", character.encode("unicode_escape", "surrogatepass").decode(), class_="hidden"))
        else:
            parts.append(character)
    return join(*parts)
