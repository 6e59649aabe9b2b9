"""A short English text for every class of the demo's tasks: their embeddings are the heads. Classes are named as in the files."""

NEWSGROUPS = {
    "alt.atheism": "atheism and arguments against the existence of god",
    "comp.graphics": "computer graphics and image formats",
    "comp.os.ms-windows.misc": "Microsoft Windows software and drivers",
    "comp.sys.ibm.pc.hardware": "IBM PC hardware, disk controllers and motherboards",
    "comp.sys.mac.hardware": "Apple Macintosh hardware",
    "comp.windows.x": "the X window system and Motif programming",
    "misc.forsale": "items for sale, price and shipping",
    "rec.autos": "cars, driving and car dealers",
    "rec.motorcycles": "motorcycles and riding",
    "rec.sport.baseball": "baseball games, teams and players",
    "rec.sport.hockey": "ice hockey games, teams and players",
    "sci.crypt": "cryptography, encryption and privacy",
    "sci.electronics": "electronic circuits and components",
    "sci.med": "medicine, diseases and treatment",
    "sci.space": "space flight, orbits and NASA",
    "soc.religion.christian": "Christian faith, the church and the Bible",
    "talk.politics.guns": "gun control, firearms and the law",
    "talk.politics.mideast": "Middle East politics, Israel, Arabs, Turkey and Armenia",
    "talk.politics.misc": "politics, government and society",
    "talk.religion.misc": "religion, cults and morality",
}
REUTERS = {
    "acq": "a company acquires or merges with another company",
    "crude": "crude oil prices and production",
    "earn": "quarterly earnings, profit and dividends of a company",
    "grain": "grain, wheat and corn harvests",
    "interest": "interest rates set by banks",
    "money-fx": "foreign exchange and the money market",
    "ship": "shipping, vessels and ports",
    "trade": "international trade, tariffs and imports",
}
AUTHORS = {
    "HillaryClinton": "a tweet by Hillary Clinton",
    "realDonaldTrump": "a tweet by Donald Trump",
}
REVIEWS = {
    "fresh": "a great and enjoyable film",
    "rotten": "a bad and boring film",
}
CHAPTERS = {
    "1": "infectious and parasitic diseases",
    "2": "neoplasms, tumours and cancer",
    "3": "diseases of the blood and immune mechanism",
    "4": "endocrine, nutritional and metabolic diseases",
    "5": "mental and behavioral disorders",
    "6": "diseases of the nervous system",
    "7": "diseases of the eye",
    "8": "diseases of the ear",
    "9": "diseases of the heart and circulatory system",
    "10": "diseases of the respiratory system",
    "11": "diseases of the digestive system",
    "12": "diseases of the skin",
    "13": "diseases of the musculoskeletal system and connective tissue",
    "14": "diseases of the kidney and genitourinary system",
    "15": "pregnancy and childbirth",
    "16": "conditions of the newborn in the perinatal period",
    "17": "congenital malformations and chromosomal abnormalities",
    "18": "symptoms, signs and abnormal laboratory findings",
    "19": "injury and poisoning",
    "20": "external causes of accidents",
    "21": "factors influencing health status and contact with health services",
}
TWEETS = {"negative": "a negative, unhappy message", "positive": "a positive, happy message"}
PRODUCTS = {"negative": "a bad product, it does not work", "positive": "a great product, it works well"}
PARTIES = {
    "Democratic": "a Democratic candidate speaks in a debate",
    "Moderator": "the moderator asks a question in a debate",
    "Republican": "a Republican candidate speaks in a debate",
}
EDITORIALS = {"negative": "bad news, a crisis, criticism of the government", "positive": "good news, progress, praise"}
CONVENTIONS = {
    "democrat": "a Democrat speaks at the convention for Barack Obama",
    "republican": "a Republican speaks at the convention for Mitt Romney",
}
FRIENDS = {
    "Chandler": "Chandler makes a sarcastic joke",
    "Joey": "Joey talks about food, women and acting",
    "Monica": "Monica talks about cooking, cleaning and Chandler",
    "Phoebe": "Phoebe says something strange",
    "Rachel": "Rachel talks about fashion, work and Ross",
    "Ross": "Ross talks about dinosaurs, marriage and his son",
}
READERS = {"adult": "a passage of a novel for adults", "children": "a passage of a story for children"}
HEADS = {
    "ANIMALS INSECTS": "an animal or an insect",
    "PLANTS": "a plant",
    "DISEASE": "a disease",
    "FOOD": "food",
    "CLOTHING": "clothing",
    "FEAR FEARFULNESS": "fear",
    "MUSIC": "music",
    "INSANITY MANIA": "insanity and mania",
    "THE UNIVERSE ASTRONOMY": "the universe and astronomy",
    "THE BODY": "the body",
    "KNOWLEDGE": "knowledge",
    "WATER TRAVEL": "travel by water",
    "IMPAIRMENT": "damage and impairment",
    "SHOW BUSINESS THEATER": "theatre and show business",
    "AVIATION": "aviation",
    "EXCITEMENT": "excitement",
}
