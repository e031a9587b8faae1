"""The words that facts are made of, and values of many forms drawn from them.

The lists were written for this package. None is from a benchmark, whose prompts must stay unseen in training.
"""

import string
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

Rng = np.random.Generator
T = TypeVar("T")


def _list(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.replace("\n", " ").split(","))


FIRST_NAMES = _list("""
Adele, Agnes, Akira, Alma, Amara, Anders, Anton, Beata, Bela, Bruno, Carla, Cedric, Celia, Chidi, Dalia, Darius,
Delia, Dimitri, Edda, Elif, Elmar, Emeka, Enzo, Esther, Fatima, Felix, Fiona, Gideon, Greta, Gustav, Hana, Hassan,
Hedwig, Henrik, Ida, Ilse, Imran, Ines, Ivo, Jadwiga, Jorge, Josefa, Kaito, Kamala, Karim, Katja, Lars, Leila,
Leopold, Lotte, Magda, Malik, Marek, Mei, Mireille, Nadia, Niko, Noor, Olga, Omar, Oskar, Paloma, Pavel, Petra,
Priya, Rafael, Renata, Ronja, Ruben, Sanjay, Selma, Silas, Soraya, Stellan, Tamar, Teodor, Thea, Tomasz, Ulla,
Vera, Viktor, Wanda, Yara, Yusuf, Zelda, Zoltan""")
LAST_NAMES = _list("""
Abara, Ahlgren, Albrecht, Almeida, Aydin, Bakker, Banerjee, Barlow, Becker, Bergstrom, Bianchi, Bondar, Brandt,
Castell, Chaudhry, Cisse, Conti, Dahl, Damico, Delgado, Drummond, Duarte, Egger, Eriksen, Falk, Farouk, Ferreira,
Fontaine, Fujita, Gallo, Gerlach, Grabowski, Haddad, Hartmann, Hollis, Horvat, Ito, Jansen, Jovanovic, Kapoor,
Keller, Kimura, Kowalska, Kruger, Laurent, Lindqvist, Lombardi, Malik, Marchetti, Mbeki, Mercier, Moreau, Nakamura,
Nowak, Oduya, Okafor, Olsen, Ortega, Pavlova, Pereira, Petrov, Quist, Rahimi, Rossi, Rousseau, Sandoval, Schuster,
Serrano, Sorensen, Tanaka, Thorne, Tremblay, Ulrich, Vargas, Vidal, Vogel, Walcott, Weiss, Yilmaz, Zeman""")
RELATIONS = _list("""
sister, brother, aunt, uncle, cousin, neighbour, dentist, landlord, plumber, piano teacher, boss, niece, nephew,
flatmate, grandmother, godfather, hairdresser, accountant""")
TOWNS = _list("""
Aldermoor, Ashby, Bellinzona, Bergen, Brackwater, Brno, Cadiz, Carrow, Coimbra, Dunmore, Eastmere, Esbjerg,
Fallowfield, Galway, Ghent, Gorizia, Halden, Harrogate, Innsbruck, Izmir, Kaunas, Kendal, Lakeport, Leiden, Linz,
Lowick, Lucca, Malmo, Marlow, Mirefield, Nantes, Northgate, Odense, Oulu, Padua, Pecs, Perth, Quimper, Ravenna,
Riga, Rosscarbery, Salamanca, Seahaven, Split, Stavanger, Sutton, Tarbert, Tartu, Trieste, Turku, Ullapool,
Utrecht, Varna, Verona, Wexford, Windermere, Yarrow, Zadar""")
THINGS = _list("""
accordion, anvil, atlas, backpack, barometer, blanket, camera, candlestick, canoe, cello, clock,
compass, cradle, drill, drum, easel, fiddle, flute, globe, harp, helmet, inkwell, jigsaw, kayak, kettle, kite,
lamp, lantern, lawn mower, loom, mandolin, microscope, mirror, oboe, paddle, piano, printer, projector, radio,
rocking chair, rowing boat, saddle, samovar, scooter, sewing machine, skateboard, sledge, stapler, stove, suitcase,
teapot, telescope, tent, toolbox, tricycle, trumpet, typewriter, umbrella, vase, violin, waffle iron, wheelbarrow,
workbench""")
QUALITIES = _list("""
antique, battered, blue, brass, broken, copper, crimson, dented, folding, green, grey, heavy, ivory, large, old,
orange, painted, portable, purple, red, rusty, silver, small, spare, striped, tall, white, wooden, yellow""")
PARTS_OF_BUILDINGS = _list("""
archive, attic, back gate, bicycle shed, boat house, boiler room, cellar, cold store, front door, garage, garden
shed, greenhouse, kitchen door, laboratory, laundry, library annex, lift, loading bay, locker room, mail room,
music room, observatory, pantry, parking deck, reading room, roof terrace, server room, side entrance, staff room,
stables, studio, vault, west wing, wine cellar, workshop""")
VENUES = _list("""
bakery, bookshop, campsite, chess club, community hall, day nursery, dental practice, florist, guest house, gym,
harbour office, hostel, ice rink, law office, museum, pharmacy, pottery, rowing club, sports hall, tea room,
theatre, town hall, vet, yoga school""")
EVENTS = _list("""
annual dinner, audit, book fair, budget review, choir practice, council meeting, dress rehearsal, exam, farewell
party, fire drill, fitting, flood briefing, guided tour, harvest supper, housewarming, interview, language class,
lecture on bees, lunch with the editors, parents' evening, photo session, planning meeting, poetry reading, quiz
night, raffle, safety training, spring concert, stocktaking, swimming lesson, tasting, team breakfast, translation
workshop, vaccination, vintage market, wedding rehearsal, wine tasting""")
PROJECTS = _list("""
bridge survey, catalogue, charity calendar, coastal map, cookbook, customs report, documentary, exhibition, flood
model, garden plan, grant application, heating study, insurance claim, irrigation plan, kitchen renovation,
lighthouse repair, logo design, marine census, newsletter, orchard inventory, parish history, playground, radio
play, recycling study, roof repair, school timetable, soil analysis, tax return, tender, thesis, timber contract,
tunnel design, water audit, wind farm report, yearbook""")
ACCOUNTS = _list("""
backup drive, bank portal, booking system, calendar app, catering account, cloud folder, e-mail list, family
tablet, guest laptop, insurance site, library account, mapping tool, payroll system, photo archive, printer queue,
school portal, shared notebook, ticket shop, tracking page, travel account, video channel, weather station""")
DEPARTMENTS = _list("""
accounts, archives, catering, complaints, customs, design, dispatch, engineering, export, facilities, housing,
inspections, lending, logistics, maintenance, marketing, permits, procurement, research, sales, security, training,
translation""")
CONTAINERS = _list("""
barrel, basket, biscuit tin, bucket, cardboard box, chest, cool box, cupboard, drawer, glass jar, duffel bag,
hamper, linen sack, locker, metal case, sideboard, trunk, wooden crate""")
CONTENTS = _list("""
acorns, apples, batteries, buttons, candles, chestnuts, coins, corks, eggs, envelopes, keys, lemons, marbles,
matches, needles, onions, oranges, pears, pebbles, pencils, plates, screws, seashells, spoons, stamps, tea bags,
tickets, walnuts""")
HIDING_PLACES = _list("""
behind the boiler, behind the dresser, behind the mirror, behind the oil painting, beside the fuse box, in the
bread bin, in the coal shed, in the flour tin, in the hollow oak, in the laundry basket, in the left boot, in the
letter box, in the lining of the coat, in the piano stool, in the spare tyre, in the top drawer, in the umbrella
stand, inside the grandfather clock, on top of the wardrobe, under the bird bath, under the doormat, under the
flowerpot, under the loose floorboard, under the mattress, under the sink, under the third step""")
FOODS = _list("""
almonds, buckwheat, cashews, celery, clams, cocoa, coriander, eggs, figs, garlic, gluten, hazelnuts, honey, kiwi
fruit, lentils, lobster, lupins, mangoes, milk, mushrooms, mussels, mustard, oats, oysters, peaches, peanuts, pine
nuts, pistachios, poppy seeds, prawns, rye, sesame, shellfish, soya, strawberries, tomatoes, walnuts, yeast""")
JOBS = _list("""
actuary, arborist, archivist, baker, beekeeper, blacksmith, bookbinder, botanist, bricklayer, carpenter,
cartographer, chemist, cooper, court reporter, customs officer, diver, ferry captain, firefighter, geologist,
glazier, goldsmith, gardener, interpreter, joiner, journalist, judge, librarian, locksmith, midwife, notary, nurse,
optician, paramedic, pastry cook, piano tuner, pilot, potter, roofer, saddler, sculptor, shepherd, signwriter,
stonemason, surveyor, tailor, tram driver, translator, upholsterer, watchmaker, weaver, welder""")
ANIMALS = _list("canary, cat, dog, donkey, goat, goose, guinea pig, hamster, horse, parrot, pony, rabbit, tortoise")
PET_NAMES = _list("""
Banjo, Biscuit, Boots, Bramble, Cinders, Clementine, Cobweb, Custard, Domino, Fidget, Gherkin, Ginger, Inky,
Juniper, Kipper, Maple, Marmalade, Mischief, Moss, Nutmeg, Olive, Paprika, Patches, Pepper, Pickle, Pippin,
Pudding, Quince, Rascal, Rhubarb, Saffron, Socks, Sorrel, Thimble, Tinker, Truffle, Waffles, Whisper, Ziggy""")
FAVOURITES = {
    "colour": _list("""
amber, aquamarine, beige, burgundy, indigo, lilac, magenta, maroon, mint green, navy blue, ochre, teal"""),
    "fruit": _list("""
apricots, blackberries, cherries, gooseberries, grapes, melons, nectarines, papaya, plums, quinces"""),
    "instrument": _list("""
bagpipes, banjo, bassoon, clarinet, harmonica, lute, recorder, saxophone, sitar, tuba, viola"""),
    "sport": _list("""
archery, badminton, curling, fencing, handball, judo, rowing, rugby, squash, table tennis, volleyball"""),
    "dish": _list("""
bean stew, dumplings, fish pie, gnocchi, goulash, lasagne, moussaka, onion soup, paella, ramen, risotto"""),
    "flower": _list("""
asters, bluebells, crocuses, dahlias, foxgloves, irises, lavender, peonies, poppies, snowdrops, tulips"""),
}  # fmt: skip
LANGUAGES = _list("""
Amharic, Armenian, Basque, Bengali, Catalan, Danish, Estonian, Finnish, Galician, Georgian, Greek, Hungarian,
Icelandic, Kurdish, Latvian, Maltese, Nepali, Polish, Quechua, Romanian, Slovene, Somali, Swahili, Tamil, Turkish,
Welsh""")
CODE_NAMES = _list("""
Amber Heron, Black Thistle, Blue Lantern, Cold Harbour, Copper Moon, Distant Bell, Easy Anchor, Fallen Oak, Glass
Mountain, Golden Hinge, Grey Falcon, Hidden Ferry, Iron Daisy, Late Swallow, Long Meadow, Lost Button, Morning
Tide, North Window, Paper Tiger, Quiet Otter, Red Pepper, Silver Ladder, Slow River, Stone Soup, Velvet Fox, Winter
Garden""")
PASSWORD_WORDS = _list("""
acorn, badger, barley, beacon, bonfire, bramble, cactus, candle, cobalt, comet, coral, cricket, daisy, ember,
falcon, fennel, ginger, glacier, hazel, heron, indigo, ivy, jasper, juniper, kestrel, lagoon, lemon, lichen, maple,
marble, meadow, nectar, nettle, nimbus, onyx, orchid, otter, pebble, pepper, plover, quartz, raven, rowan, saffron,
sparrow, thistle, timber, topaz, tulip, tundra, velvet, walnut, willow, zephyr""")
ERRANDS = _list("""
a bag of flour, a ball of string, a box of chalk, a bunch of carrots, a can of paint, a dozen rolls, a jar of
olives, a loaf of rye bread, a new broom, a pack of light bulbs, a pair of gloves, a pound of butter, a roll of
tape, a tin of sardines, birthday cards, cough syrup, goat's cheese, lamp oil, shoe polish, six lemons, stamps,
tent pegs, two metres of rope, washing powder""")
VOTES = _list("""
bowling, camping, canal trip, castle, cinema, cycling, farm visit, fishing, hiking, karaoke, lake, mini golf,
observatory, picnic, planetarium, sailing, skating, steam train, zoo""")
CURRENCIES = ("${}", "£{}", "€{}", "{} euros", "{} dollars", "{} pounds", "{} crowns", "{} francs")
WEEKDAYS = _list("Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday")
MONTHS = _list("""
January, February, March, April, May, June, July, August, September, October, November, December""")


def pick(rng: Rng, options: Sequence[T]) -> T:
    return options[int(rng.integers(len(options)))]


def sample(rng: Rng, options: Sequence[T], count: int) -> list[T]:
    """`count` different ones."""
    return [options[int(i)] for i in rng.choice(len(options), count, replace=False)]


def person(rng: Rng) -> str:
    return f"{pick(rng, FIRST_NAMES)} {pick(rng, LAST_NAMES)}"


def somebody(rng: Rng) -> str:
    """A person, by name or as somebody whom the user knows."""
    return person(rng) if rng.random() < 0.75 else f"my {pick(rng, RELATIONS)}"


def thing(rng: Rng) -> str:
    return f"{pick(rng, QUALITIES)} {pick(rng, THINGS)}"


def digits(rng: Rng, count: int) -> str:
    return "".join(map(str, rng.integers(0, 10, count)))


def letters(rng: Rng, count: int) -> str:
    return "".join(pick(rng, string.ascii_uppercase) for _ in range(count))


def code(rng: Rng) -> str:
    """An access code in one of several forms, such as 4471, K7-209 or 88#31."""
    forms = (
        lambda: digits(rng, int(rng.integers(4, 7))),
        lambda: f"{letters(rng, 1)}{digits(rng, 1)}-{digits(rng, 3)}",
        lambda: f"{letters(rng, 3)}{digits(rng, 3)}",
        lambda: f"{digits(rng, 2)}#{digits(rng, 2)}",
        lambda: f"{digits(rng, 3)}-{digits(rng, 3)}",
    )
    return forms[rng.integers(len(forms))]()


def password(rng: Rng) -> str:
    first, second = sample(rng, PASSWORD_WORDS, 2)
    forms = (
        f"{first}-{second}-{digits(rng, 2)}",
        f"{first.title()}{second.title()}{digits(rng, 2)}",
        f"{first}_{second}",
    )
    return pick(rng, forms)


def phone(rng: Rng) -> str:
    forms = (
        f"555-{digits(rng, 4)}",
        f"0{digits(rng, 3)} {digits(rng, 3)} {digits(rng, 3)}",
        f"({digits(rng, 3)}) 555-{digits(rng, 4)}",
    )
    return pick(rng, forms)


def serial(rng: Rng) -> str:
    forms = (
        f"{letters(rng, 2)}-{digits(rng, 5)}",
        f"{letters(rng, 3)}/{digits(rng, 4)}",
        f"{digits(rng, 2)}{letters(rng, 2)}{digits(rng, 4)}",
    )
    return pick(rng, forms)


def day(rng: Rng) -> str:
    """A day of the year."""
    number, month = int(rng.integers(1, 29)), pick(rng, MONTHS)
    return pick(rng, (f"{number} {month}", f"{month} {number}"))


def clock(rng: Rng) -> str:
    hour, minute = int(rng.integers(1, 12)), 5 * int(rng.integers(12))
    return f"{hour}:{minute:02d} {pick(rng, ('am', 'pm'))}"


def price(rng: Rng) -> str:
    amount = pick(rng, (str(rng.integers(3, 950)), f"{rng.integers(1, 90)}.{digits(rng, 1)}0"))
    return pick(rng, CURRENCIES).format(amount)
