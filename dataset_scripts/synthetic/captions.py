"""Writes captions: a small English grammar over the attributes of a person.

The two domains share most of their words. Each also has words that the other does not use, as two groups of annotators
would.
"""

import random
from collections.abc import Callable, Collection
from typing import NamedTuple

from .people import Person

DOMAINS = ("source", "target")

Words = dict[str, tuple[list[str], list[str], list[str]]]
"""For each value: the words of both domains, those of the source only, and those of the target only."""

_SUBJECT: Words = {
    "man": (["man", "male pedestrian"], ["guy"], ["gentleman", "male"]),
    "woman": (["woman", "female pedestrian"], ["lady"], ["female", "girl"]),
}
_BUILD: Words = {
    "slim": (["slim", "thin"], ["slender"], ["skinny"]),
    "average": (["medium built"], ["average built"], ["normal sized"]),
    "heavy": (["heavy", "stocky"], ["broad"], ["large", "overweight"]),
}
_HAIR: Words = {
    "short": (["short {colour} hair"], ["short cut {colour} hair"], ["cropped {colour} hair"]),
    "long": (["long {colour} hair"], ["{colour} hair down the back"], ["long loose {colour} hair"]),
    "ponytail": (
        ["a {colour} ponytail", "{colour} hair in a ponytail"],
        ["{colour} hair tied back"],
        ["a {colour} pony tail"],
    ),
    "bun": (["a {colour} bun", "{colour} hair in a bun"], ["{colour} hair pinned up"], ["{colour} hair in a knot"]),
}
_COLOUR: Words = {
    "black": (["black"], ["jet black"], ["dark black"]),
    "white": (["white"], ["snow white"], ["off white"]),
    "grey": (["grey"], ["silver"], ["gray"]),
    "red": (["red"], ["bright red"], ["crimson"]),
    "orange": (["orange"], ["bright orange"], ["rusty orange"]),
    "yellow": (["yellow"], ["bright yellow"], ["mustard yellow"]),
    "green": (["green"], ["grass green"], ["dark green"]),
    "blue": (["blue"], ["bright blue"], ["navy blue"]),
    "purple": (["purple"], ["violet"], ["dark purple"]),
    "pink": (["pink"], ["hot pink"], ["rose pink"]),
    "brown": (["brown"], ["chestnut brown"], ["dark brown"]),
    "blond": (["blond"], ["fair"], ["blonde"]),
}
_PATTERN: Words = {
    "plain": (["plain"], ["solid"], ["unpatterned"]),
    "striped": (["striped"], ["stripy"], ["stripe patterned"]),
    "checked": (["checked", "plaid"], ["checkered"], ["tartan"]),
    "dotted": (["dotted"], ["polka dot"], ["spotted"]),
}
_HAT: Words = {
    "cap": (["cap"], ["baseball cap"], ["peaked cap"]),
    "beanie": (["beanie", "knitted hat"], ["woolly hat"], ["knit cap"]),
    "sun hat": (["sun hat", "wide brimmed hat"], ["straw hat"], ["brimmed hat"]),
}
_UPPER: Words = {
    "t-shirt": (["t-shirt"], ["short sleeved top"], ["tee", "short sleeve t-shirt"]),
    "shirt": (["shirt", "buttoned shirt"], ["long sleeved shirt"], ["button up shirt"]),
    "sweater": (["sweater"], ["jumper"], ["pullover"]),
    "hoodie": (["hoodie"], ["hooded top"], ["hooded sweatshirt"]),
    "jacket": (["jacket"], ["open jacket"], ["short jacket"]),
    "coat": (["coat", "long coat"], ["overcoat"], ["knee length coat"]),
    "tank top": (["tank top"], ["sleeveless top"], ["sleeveless shirt"]),
}
_LOWER: Words = {
    "trousers": (["trousers", "pants"], ["long trousers"], ["slacks"]),
    "jeans": (["jeans"], ["denim trousers"], ["denim jeans"]),
    "shorts": (["shorts"], ["knee length shorts"], ["short pants"]),
    "skirt": (["skirt"], ["knee length skirt"], ["short skirt"]),
}
_SHOES: Words = {
    "sneakers": (["sneakers", "trainers"], ["sports shoes"], ["running shoes"]),
    "boots": (["boots"], ["ankle boots"], ["high boots"]),
    "sandals": (["sandals"], ["open sandals"], ["open toed shoes"]),
    "leather shoes": (["leather shoes"], ["dress shoes"], ["formal shoes"]),
}
_BAG: Words = {
    "backpack": (["backpack"], ["school bag"], ["rucksack"]),
    "handbag": (["handbag"], ["small bag in {their} hand"], ["purse"]),
    "shoulder bag": (["shoulder bag"], ["bag across the body"], ["messenger bag"]),
    "shopping bag": (["shopping bag"], ["carrier bag"], ["tote bag"]),
}

# The probability that a caption mentions each thing. A caption never says that the person does not have something.
_MENTION_PROBABILITIES = {
    "gender": 0.9,
    "build": 0.2,
    "hair": 0.45,
    "hair_colour": 0.4,
    "hat": 0.6,
    "upper": 0.92,
    "upper_colour": 0.85,
    "upper_pattern": 0.6,
    "lower": 0.85,
    "lower_colour": 0.8,
    "lower_pattern": 0.45,
    "shoes": 0.55,
    "shoes_colour": 0.8,
    "bag": 0.6,
    "accessory_colour": 0.7,
}

# The attributes that a caption leaves out together. It always mentions its person's upper garment.
_PARTS: dict[str, tuple[str, ...]] = {
    "hair": ("hair", "hair_colour"),
    "upper": ("upper_colour", "upper_pattern"),
    "lower": ("lower", "lower_colour", "lower_pattern"),
    "shoes": ("shoes", "shoes_colour"),
    "hat": ("hat", "hat_colour"),
    "bag": ("bag", "bag_colour"),
}


def choose_left_out(earlier: Collection[str], agreement: float, rng: random.Random) -> set[str]:
    """Draws the attributes that a caption leaves out because earlier captions of the same image mention them.

    Args:
        earlier: the names of the attributes that the earlier captions of the image mention.
        agreement: the probability that the caption may mention a part (hair, colour and pattern of the upper garment,
            lower garment, shoes, hat, bag) that an earlier one mentions, 0 to 1.
        rng: the only source of randomness.

    Returns:
        The names of the attributes. They are always whole parts, and never contain `gender`, `build` or `upper`.
    """
    repeated = [names for names in _PARTS.values() if rng.random() >= agreement and not set(names).isdisjoint(earlier)]
    return {name for names in repeated for name in names}


def _choose_mentions(person: Person, rng: random.Random, mentions: float) -> set[str]:
    """Draws the names of the attributes that a caption mentions."""
    chosen = {name: rng.random() < probability * mentions for name, probability in _MENTION_PROBABILITIES.items()}
    mentioned = {name for name in ("gender", "build") if chosen[name]}
    if chosen["hair"]:
        mentioned.add("hair")
        if chosen["hair_colour"]:
            mentioned.add("hair_colour")
    for part in ("upper", "lower"):
        # The upper garment is always mentioned. A colour or a pattern is mentioned only together with its garment,
        # because nobody writes "something red".
        if part == "upper" or chosen[part]:
            mentioned.add(part)
            if chosen[f"{part}_colour"]:
                mentioned.add(f"{part}_colour")
            # People rarely mention that cloth is plain.
            if chosen[f"{part}_pattern"] and (person[f"{part}_pattern"] != "plain" or rng.random() < 0.15):
                mentioned.add(f"{part}_pattern")
    if chosen["shoes"]:
        mentioned.add("shoes")
        if chosen["shoes_colour"]:
            mentioned.add("shoes_colour")
    for part in ("hat", "bag"):
        if person[part] != "none" and chosen[part]:
            mentioned.add(part)
            if chosen["accessory_colour"]:
                mentioned.add(f"{part}_colour")
    return mentioned


class _WordChooser:
    """Chooses words for the mentioned attributes of one person.

    Args:
        person: the attributes, see `ATTRIBUTES`.
        mentioned: the names of the mentioned attributes.
        domain: `source` or `target`.
        rng: the only source of randomness.
    """

    def __init__(self, person: Person, mentioned: set[str], domain: str, rng: random.Random):
        self.person, self.mentioned, self.rng = person, mentioned, rng
        self.domain_index = 1 + DOMAINS.index(domain)

    def word(self, words: Words, attribute: str) -> str:
        """Chooses a word for the value of an attribute."""
        choices = words[self.person[attribute]]
        return self.rng.choice(choices[0] if self.rng.random() < 0.65 else choices[self.domain_index])

    def colour(self, attribute: str) -> str:
        """Chooses a word for a colour; returns an empty string if it is not mentioned."""
        return self.word(_COLOUR, attribute) if attribute in self.mentioned else ""

    def thing(self, words: Words, attribute: str) -> str:
        """Puts a thing, its colour and its pattern together; returns an empty string if it is not mentioned."""
        if attribute not in self.mentioned:
            return ""
        colour = self.colour(f"{attribute}_colour")
        pattern = self.word(_PATTERN, f"{attribute}_pattern") if f"{attribute}_pattern" in self.mentioned else ""
        return " ".join(part for part in (colour, pattern, self.word(words, attribute)) if part)


class _Phrases(NamedTuple):
    """The parts of a caption. `they` and `their` are the pronouns; a part that is not mentioned is empty."""

    subject: str
    they: str
    their: str
    hair: str
    upper: str
    lower: str
    shoes: str
    hat: str
    bag: str


class _Verbs(NamedTuple):
    wears: str
    carries: str


def make_caption(
    person: Person, domain: str, rng: random.Random, mentions: float = 1.0, left_out: Collection[str] = ()
) -> tuple[str, list[str]]:
    """Writes one caption of a person.

    Args:
        person: the attributes, see `ATTRIBUTES`.
        domain: `source` or `target`: decides which words may be used in addition to the common ones.
        rng: the only source of randomness: the attributes mentioned, their words and their order.
        mentions: factor on how often each attribute is mentioned; the upper garment always is.
        left_out: names of attributes that the caption does not mention, see [`choose_left_out`].

    Returns:
        The caption (one to three English sentences, about 22 words), and the sorted names of the attributes that it
        mentions.

    Raises:
        ValueError: `domain` is unknown.
    """
    if domain not in DOMAINS:
        raise ValueError(f"domain is {domain!r}, it must be one of {', '.join(DOMAINS)}")
    # The order of the random draws in this file must stay: another order gives other captions for the same seed.
    mentioned = _choose_mentions(person, rng, mentions).difference(left_out)
    phrases = _choose_phrases(_WordChooser(person, mentioned, domain, rng))
    verbs = _Verbs(
        rng.choice(["wears", "is wearing", "is dressed in", "has on"]), rng.choice(["carries", "is carrying", "has"])
    )
    sentences = _ARRANGEMENTS[rng.randrange(len(_ARRANGEMENTS))](phrases, verbs, rng)
    return " ".join(sentence[0].upper() + sentence[1:] + "." for sentence in sentences), sorted(mentioned)


def _choose_phrases(chooser: _WordChooser) -> _Phrases:
    person, mentioned, rng = chooser.person, chooser.mentioned, chooser.rng
    if "gender" in mentioned:
        noun = chooser.word(_SUBJECT, "gender")
        they, their = ("she", "her") if person["gender"] == "woman" else ("he", "his")
    else:
        noun, they, their = rng.choice(["person", "pedestrian"]), "the person", "the"
    if "build" in mentioned:
        noun = f"{chooser.word(_BUILD, 'build')} {noun}"
    subject = rng.choice([_add_article(noun), f"the {noun}", f"this {noun}"])
    hair = ""
    if "hair" in mentioned:
        # A hair style without a colour leaves a double space.
        hair = " ".join(chooser.word(_HAIR, "hair").format(colour=chooser.colour("hair_colour")).split())
        hair = hair.replace("a orange", "an orange")
    upper = _add_article(chooser.thing(_UPPER, "upper"))
    lower = chooser.thing(_LOWER, "lower")
    if lower and person["lower"] == "skirt":
        lower = _add_article(lower)
    elif lower and rng.random() < 0.25:
        lower = f"a pair of {lower}"
    shoes = chooser.thing(_SHOES, "shoes")
    hat = _add_article(chooser.thing(_HAT, "hat"))
    bag = _add_article(chooser.thing(_BAG, "bag")).format(their=their)
    return _Phrases(subject, they, their, hair, upper, lower, shoes, hat, bag)


def _add_article(phrase: str) -> str:
    """Adds `a` or `an`; an empty phrase stays empty."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}" if phrase else ""


def _join(phrases: list[str]) -> str:
    """Joins phrases with commas and a final `and`; empty ones are skipped."""
    phrases = [phrase for phrase in phrases if phrase]
    return phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]


def _clothes_first(phrases: _Phrases, verbs: _Verbs, rng: random.Random) -> list[str]:
    """The clothes from top to bottom, then everything else."""
    subject, they, their, hair, upper, lower, shoes, hat, bag = phrases
    sentences = [f"{subject} {verbs.wears} {_join([upper, lower, shoes])}"]
    if hair:
        sentences.append(f"{they} has {hair}")
    if hat and bag:
        sentences.append(f"{they} {verbs.carries} {bag} and wears {hat}")
    elif bag:
        sentences.append(f"{they} {verbs.carries} {bag}")
    elif hat:
        sentences.append(f"{they} has {hat} on {their} head")
    return sentences


def _head_first(phrases: _Phrases, verbs: _Verbs, rng: random.Random) -> list[str]:
    """Hair and hat first."""
    subject, they, their, hair, upper, lower, shoes, hat, bag = phrases
    head = f" with {_join([hair, hat])}" if hair or hat else ""
    sentences = [f"{subject}{head} {verbs.wears} {_join([upper, lower])}"]
    if shoes:
        sentences.append(f"{their} shoes are {shoes}" if rng.random() < 0.3 else f"{they} wears {shoes}")
    if bag:
        sentences.append(f"{they} {verbs.carries} {bag}")
    return sentences


def _bag_first(phrases: _Phrases, verbs: _Verbs, rng: random.Random) -> list[str]:
    """The bag first, then the clothes."""
    subject, they, _, hair, upper, lower, shoes, hat, bag = phrases
    clothes = f"{subject} {verbs.wears} {_join([upper, lower])}"
    sentences = [f"carrying {bag}, {clothes}" if bag else clothes]
    if shoes or hat:
        sentences.append(f"{they} also wears {_join([shoes, hat])}")
    if hair:
        sentences.append(f"{they} has {hair}")
    return sentences


def _shoes_first(phrases: _Phrases, verbs: _Verbs, rng: random.Random) -> list[str]:
    """From the bottom to the top."""
    subject, they, _, hair, upper, lower, shoes, hat, bag = phrases
    if lower or shoes:
        sentences = [f"{subject} {verbs.wears} {_join([lower, shoes])} with {upper}"]
    else:
        sentences = [f"{subject} {verbs.wears} {upper}"]
    if hair or hat:
        sentences.append(f"{they} has {_join([hair, hat])}")
    if bag:
        sentences.append(f"{bag} can be seen as well")
    return sentences


def _one_sentence(phrases: _Phrases, verbs: _Verbs, rng: random.Random) -> list[str]:
    """Everything in one long sentence."""
    subject, _, _, hair, upper, lower, shoes, hat, bag = phrases
    sentence = f"{subject} in {_join([upper, lower])}"
    if hair or hat or shoes:
        sentence += f", with {_join([hair, hat, shoes])}"
    sentence += f", is walking with {bag}" if bag else rng.choice([", is walking", ", is standing"])
    return [sentence]


# Each one puts the phrases into sentences in another order.
_ARRANGEMENTS: tuple[Callable[[_Phrases, _Verbs, random.Random], list[str]], ...] = (
    _clothes_first,
    _head_first,
    _bag_first,
    _shoes_first,
    _one_sentence,
)
