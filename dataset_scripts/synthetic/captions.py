"""What is said: a small English grammar over the attributes of a person.

Two domains share most of their words; each has some of its own, as two annotation campaigns would.
"""

import random

from .people import Person

DOMAINS = ("source", "target")

# value -> (words of both domains, words of the source only, words of the target only)
Words = dict[str, tuple[list[str], list[str], list[str]]]

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

# How often a caption mentions each thing that the person has. Nothing is said of what is not there.
_MENTIONED = {
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


def _choose_mentions(person: Person, rng: random.Random, mentions: float) -> set[str]:
    said = {name: rng.random() < share * mentions for name, share in _MENTIONED.items()}
    mentioned = {name for name in ("gender", "build") if said[name]}
    if said["hair"]:
        mentioned.add("hair")
        if said["hair_colour"]:
            mentioned.add("hair_colour")
    for part in ("upper", "lower"):
        if part == "upper" or said[part]:
            # A garment without its name is 'something red', which nobody writes: the name comes with the rest.
            mentioned.add(part)
            if said[f"{part}_colour"]:
                mentioned.add(f"{part}_colour")
            # That cloth is plain is worth a word less often than that it is not.
            if said[f"{part}_pattern"] and (person[f"{part}_pattern"] != "plain" or rng.random() < 0.15):
                mentioned.add(f"{part}_pattern")
    if said["shoes"]:
        mentioned.add("shoes")
        if said["shoes_colour"]:
            mentioned.add("shoes_colour")
    for part in ("hat", "bag"):
        if person[part] != "none" and said[part]:
            mentioned.add(part)
            if said["accessory_colour"]:
                mentioned.add(f"{part}_colour")
    return mentioned


def _article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def make_caption(person: Person, domain: str, rng: random.Random, mentions: float = 1.0) -> tuple[str, list[str]]:
    """Writes one caption of a person.

    Args:
        person: the attributes, see `ATTRIBUTES`.
        domain: `source` or `target`: which words may be used beside the common ones.
        rng: the only source of chance: what is mentioned, in which words and order.
        mentions: factor on how often each attribute is mentioned; the upper garment always is.

    Returns:
        The caption (one to three English sentences, 22 words or so) and the names of the attributes it states, sorted.

    Raises:
        ValueError: an unknown domain.
    """
    if domain not in DOMAINS:
        raise ValueError(f"domain is {domain!r}, it must be one of {', '.join(DOMAINS)}")
    own_words = 1 + DOMAINS.index(domain)
    mentioned = _choose_mentions(person, rng, mentions)

    def word(words: Words, value: str) -> str:
        common, own = words[value][0], words[value][own_words]
        return rng.choice(common if rng.random() < 0.65 else own)

    def colour(attribute: str) -> str:
        return word(_COLOUR, person[attribute]) if attribute in mentioned else ""

    def thing(words: Words, attribute: str) -> str:
        pattern = f"{attribute}_pattern"
        described = [
            colour(f"{attribute}_colour"),
            word(_PATTERN, person[pattern]) if pattern in mentioned else "",
            word(words, person[attribute]),
        ]
        return " ".join(part for part in described if part)

    woman = person["gender"] == "woman"
    if "gender" in mentioned:
        noun, they, their = word(_SUBJECT, person["gender"]), "she" if woman else "he", "her" if woman else "his"
    else:
        noun, they, their = rng.choice(["person", "pedestrian"]), "the person", "the"
    if "build" in mentioned:
        noun = f"{word(_BUILD, person['build'])} {noun}"
    subject = rng.choice([_article(noun), f"the {noun}", f"this {noun}"])

    hair = ""
    if "hair" in mentioned:
        hair = " ".join(word(_HAIR, person["hair"]).format(colour=colour("hair_colour")).split())
        hair = hair.replace("a orange", "an orange")
    upper = _article(thing(_UPPER, "upper"))
    lower = ""
    if "lower" in mentioned:
        lower = thing(_LOWER, "lower")
        if person["lower"] == "skirt":
            lower = _article(lower)
        elif rng.random() < 0.25:
            lower = f"a pair of {lower}"
    shoes = thing(_SHOES, "shoes") if "shoes" in mentioned else ""
    hat = _article(thing(_HAT, "hat")) if "hat" in mentioned else ""
    bag = _article(thing(_BAG, "bag")).format(their=their) if "bag" in mentioned else ""
    mentioned_names = sorted(mentioned)
    sentences = _arrange(rng, subject, they, their, hair, upper, lower, shoes, hat, bag)
    return " ".join(sentence[0].upper() + sentence[1:] + "." for sentence in sentences), mentioned_names


def _listed(parts: list[str]) -> str:
    parts = [part for part in parts if part]
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def _arrange(
    rng: random.Random,
    subject: str,
    they: str,
    their: str,
    hair: str,
    upper: str,
    lower: str,
    shoes: str,
    hat: str,
    bag: str,
) -> list[str]:
    """Puts the noun phrases (empty: not mentioned) into one of five orders of sentences."""
    wears = rng.choice(["wears", "is wearing", "is dressed in", "has on"])
    carries = rng.choice(["carries", "is carrying", "has"])
    order = rng.randrange(5)
    rest: list[str] = []
    if order == 0:  # clothes from top to bottom, then what else there is
        first = f"{subject} {wears} {_listed([upper, lower, shoes])}"
        if hair:
            rest.append(f"{they} has {hair}")
        if hat and bag:
            rest.append(f"{they} {carries} {bag} and wears {hat}")
        elif hat or bag:
            rest.append(f"{they} {carries} {bag}" if bag else f"{they} has {hat} on {their} head")
    elif order == 1:  # the head first
        with_head = f" with {_listed([hair, hat])}" if hair or hat else ""
        first = f"{subject}{with_head} {wears} {_listed([upper, lower])}"
        if shoes:
            rest.append(f"{their} shoes are {shoes}" if rng.random() < 0.3 else f"{they} wears {shoes}")
        if bag:
            rest.append(f"{they} {carries} {bag}")
    elif order == 2:  # the bag first
        first = (
            f"carrying {bag}, {subject} {wears} {_listed([upper, lower])}"
            if bag
            else f"{subject} {wears} {_listed([upper, lower])}"
        )
        if shoes or hat:
            rest.append(f"{they} also wears {_listed([shoes, hat])}")
        if hair:
            rest.append(f"{they} has {hair}")
    elif order == 3:  # from the ground up
        if lower or shoes:
            first = f"{subject} {wears} {_listed([lower, shoes])} with {upper}"
        else:
            first = f"{subject} {wears} {upper}"
        if hair or hat:
            rest.append(f"{they} has {_listed([hair, hat])}")
        if bag:
            rest.append(f"{bag} can be seen as well")
    else:  # one long sentence
        first = f"{subject} in {_listed([upper, lower])}"
        if hair or hat or shoes:
            first += f", with {_listed([hair, hat, shoes])}"
        first += f", is walking with {bag}" if bag else rng.choice([", is walking", ", is standing"])
    return [first, *rest]
