"""The English words that the rules know. Closed classes where they are closed, else the common ones."""

from __future__ import annotations

from types import MappingProxyType
from typing import Final


def vocabulary(words: str) -> frozenset[str]:
    """The set of the words in a text."""
    return frozenset(words.split())


WH: Final = vocabulary("what which who whom whose when where why how")
"""Question words."""

AUX: Final = vocabulary(
    """am are can could did do does had has have is may might must shall should was were will would"""
)
"""Verbs that stand before their subject in a question."""

SINGULAR_AUX: Final = MappingProxyType({"are": "is", "were": "was", "do": "does", "have": "has"})
"""The form of an auxiliary that goes with one thing, where it differs."""

TASKS: Final = vocabulary(
    """add advise analyse analyze argue arrange assess average brainstorm build calculate categorise categorize
    check choose classify combine compare compile compose compute contrast convert count create critique debug
    define derive describe design detect determine diagnose discuss divide draft draw edit estimate evaluate
    explain extract find fix forecast generate give identify illustrate implement improve infer interpret invent
    investigate list look measure merge multiply name optimise optimize organise organize outline paraphrase
    pick plan predict prepare propose prove provide rank recommend reconcile report research review rewrite
    schedule select simplify sketch solve sort state subtract suggest sum summarise summarize tell transform
    translate verify write"""
)
"""Verbs that begin a request for something an expert can hand over."""

DIRECTIVES: Final = vocabulary(
    """answer assume avoid be begin cite consider do don't end ensure express focus follow format ignore imagine
    include justify keep leave let let's limit make mention never note only output please pretend print quote
    refer remember reply respond return round show start stick structure suppose take think try use using walk
    work"""
)
"""Verbs that begin an instruction about *how* to answer; it belongs to a request and is none itself."""

OPENERS: Final = (
    "based on",
    "building on",
    "from there",
    "given that",
    "knowing that",
    "using that",
    "using this",
    "with that",
)
"""How a request begins that stands on the answer before it."""

SEQUENCE: Final = vocabulary("then next afterwards afterward subsequently")
"""Openers of a request that comes after the one before it."""

LAST: Final = vocabulary("finally lastly overall")
"""Openers of a request that comes after everything before it."""

LEADS: Final = vocabulary(
    """additionally also and but first firstly furthermore meanwhile moreover now ok okay or plus please second
    secondly separately so third thirdly well"""
)
"""Openers that say nothing about what a request needs."""

EXPLETIVE: Final = vocabulary(
    """possible impossible true false necessary important likely unlikely common normal safe legal illegal okay ok
    worth worthwhile better best good bad raining snowing time hard easy difficult required needed advisable"""
)
"""After "is it …": the "it" that stands for nothing."""

PERSONAL: Final = vocabulary("he him his she her hers")
"""Pronouns for one person."""

NEUTRAL: Final = vocabulary("it its")
"""Pronouns for one thing."""

PLURAL: Final = vocabulary("they them their theirs both these those")
"""Pronouns that may stand for several answers at once."""

PRONOUNS: Final = (
    PERSONAL | NEUTRAL | PLURAL | vocabulary("i me my we us our you your one someone anyone there this that")
)
"""Words that name nothing themselves."""

NOT_NAMES: Final = (
    WH
    | AUX
    | TASKS
    | DIRECTIVES
    | LEADS
    | SEQUENCE
    | LAST
    | PERSONAL
    | NEUTRAL
    | PLURAL
    | vocabulary(
        """a about above across after all although among an another any as assuming at based because before below
    besides between both by calculating comparing considering despite during each either every for from given
    going had how however i if in increase increasing decrease reduce of on one our out over rather regarding
    since some subtract such suppose supposing taking than that the there this though through to toward towards
    two three four under unlike until upon versus was we were when whereas whether while with within without you
    your my me us yes no not q"""
    )
)
"""Words that begin no name, however they are written."""

NAME_LINKS: Final = vocabulary("of the de del della di da dos du la le les van von der den el al y")
"""Small words inside names: Statue of Unity, Christ the Redeemer, Ludwig van Beethoven."""

MEASURES: Final = vocabulary(
    """age altitude area atomic-number box-office-revenue birth-rate boiling-point budget capacity carbon-footprint
    circumference cost crime-rate death-rate density depth diameter distance duration elevation fertility-rate
    gdp gdp-per-capita gross-domestic-product height hdi income inflation-rate land-area length life-expectancy
    lifespan literacy-rate market-cap market-capitalisation market-capitalization market-value mass
    maximum-speed median-income melting-point net-worth orbital-period perimeter population population-density
    power price profit radius revenue runtime salary size speed surface-area temperature top-speed
    unemployment-rate volume weight width wingspan"""
)
"""What can be measured about a thing; words joined by a hyphen here are separate in text."""

GRADES: Final = MappingProxyType(
    {
        "tall": "height",
        "high": "height",
        "short": "length or height",
        "long": "length",
        "deep": "depth",
        "shallow": "depth",
        "large": "size",
        "big": "size",
        "small": "size",
        "wide": "width",
        "narrow": "width",
        "heavy": "weight",
        "light": "weight",
        "fast": "speed",
        "slow": "speed",
        "quick": "speed",
        "old": "age",
        "young": "age",
        "expensive": "price",
        "cheap": "price",
        "dear": "price",
        "populous": "population",
        "dense": "density",
        "hot": "temperature",
        "cold": "temperature",
        "warm": "temperature",
        "great": "",
        "low": "",
        "early": "",
        "famous": "",
        "wealthy": "",
        "loud": "",
        "bright": "",
        "strong": "",
        "hard": "",
        "rich": "",
        "poor": "",
        "close": "",
        "far": "",
        "new": "age",
        "popular": "",
        "common": "",
        "powerful": "",
        "near": "",
    }
)
"""Adjectives that compare, and what they measure; empty where no single noun says it."""

OPPOSITES: Final = MappingProxyType(
    {
        "short": "long or tall",
        "shallow": "deep",
        "small": "large",
        "narrow": "wide",
        "light": "heavy",
        "slow": "fast",
        "young": "old",
        "cheap": "expensive",
        "cold": "warm",
        "poor": "rich",
        "new": "old",
    }
)
"""The adjective one asks "how …" with: "how tall", for taller and shorter alike."""

IRREGULAR_GRADES: Final = MappingProxyType(
    {
        "elder": "old",
        "eldest": "old",
        "further": "far",
        "farther": "far",
        "furthest": "far",
        "farthest": "far",
        "bigger": "big",
        "biggest": "big",
        "hotter": "hot",
        "hottest": "hot",
    }
)
"""Comparatives and superlatives that do not just add -er, -est."""

AGGREGATES: Final = vocabulary(
    """altogether average averaged combined compare compared differ difference exceed exceeds fewer fewest greater
    greatest least less mean median more most product proportion ratio ratios sum summed together total"""
)
"""Words that ask for one figure out of several."""

ORDINALS: Final = vocabulary("first earlier earliest later latest last recently sooner before")
"""Words that compare points in time."""

PERSONS: Final = vocabulary(
    """actor actress architect artist astronaut athlete author boy brother captain ceo chairman champion child
    children coach comedian commander composer conductor creator customer dancer daughter designer director
    doctor driver drummer emperor engineer explorer farmer father filmmaker footballer founder friend girl
    governor grandfather grandmother guitarist head host husband inventor journalist judge king lawyer leader
    lyricist man manager mathematician mayor minister mother musician narrator novelist nurse officer owner
    painter partner patient person philosopher photographer physicist pianist pilot player poet politician pope
    president prince princess producer publisher queen rapper scientist screenwriter sculptor senator singer
    sister soldier son songwriter spouse star student surfer teacher translator user vocalist wife winner woman
    worker writer"""
)
"""Nouns for somebody: one asks "who is the …", not "what is the …"."""

ROLES: Final = vocabulary(
    """birthplace capital headquarters hometown currency spouse author director founder wife husband mother father
    daughter son brother sister composer creator inventor ceo president mayor king queen governor chairman owner
    manufacturer developer publisher producer writer screenwriter architect designer painter captain coach
    manager conductor successor predecessor seat sequel prequel narrator"""
)
"""Nouns that lead from one thing to one other: the *director* of a film, the *capital* of a country."""

VAGUE: Final = vocabulary(
    """amount answer aspect case chance circumstance cost day degree difference effect end event example extent
    fact fraction idea impact issue kind level list lot manner meaning moment month name number one ones part
    people percentage period place point possibility problem process purpose question reason reasons result role
    same sort step steps sum thing things time title total type use value way ways word words world year years"""
)
"""Nouns too general to be looked up on their own, before a relative clause or "of"."""

DISTRIBUTED: Final = vocabulary(
    """answer classify define describe explain paraphrase rephrase rewrite solve summarise summarize translate"""
)
"""Requests that mean each item of the list that follows on its own."""
