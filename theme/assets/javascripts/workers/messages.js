// A pasted message is found by its words in their order. The theme's search, which this worker contains, looks for any of the words and reads
// colons, quotes and asterisks as commands. What holds the message comes first; what the theme's search found follows.
"use strict"

// The theme's protocol, of Material and of Zensical. Material's results are groups of documents, Zensical's name documents by their number.
const SETUP = 0, QUERY = 2, RESULT = 3
const ENOUGH_WORDS = 4 // a run this long is a message; a shorter query must stand in a symptom
const AT_MOST = 3

let zensical = false
let sections = []
let known = new Map() // of each pair of words: in how many sections
let first = []

// Numbers are left out: they differ from run to run.
function words(text) {
  return text.toLowerCase().split(/[^\p{L}\p{N}_]+/u).filter(word => word !== "" && !/^\d+$/.test(word))
}

function plain(html) {
  const entities = { lt: "<", gt: ">", amp: "&", quot: '"', "#39": "'", "#x27": "'" }
  return html.replace(/<[^>]*>/g, " ").replace(/&(#?\w+);/g, (whole, name) => entities[name] ?? whole)
}

function pairs(list) {
  return list.slice(1).map((word, place) => `${list[place]} ${word}`)
}

function prepare(documents) {
  const parents = new Map(documents.map(one => [one.location, one]))
  sections = documents.map((one, id) => {
    const blocks = one.text.split(/(?<=<\/(?:li|p|tr|pre|h\d)>)/).filter(block => plain(block).trim() !== "")
    const symptom = blocks.find(block => /^\W*Symptom\b/.test(plain(block))) ?? ""
    return {
      id,
      document: one,
      parent: parents.get(one.location.split("#")[0]),
      entry: /#m\d\d$/.test(one.location),
      symptom,
      blocks,
      words: words(`${plain(one.title)} ${plain(one.text)}`),
    }
  })
  known = new Map()
  for (const section of sections)
    for (const pair of new Set(pairs(section.words)))
      known.set(pair, (known.get(pair) ?? 0) + 1)
}

// The longest run of words that both lists have, as its words.
function run(asked, found) {
  let best = 0, end = 0, before = new Uint16Array(found.length + 1)
  for (let i = 0; i < asked.length; i++) {
    const now = new Uint16Array(found.length + 1)
    for (let j = 0; j < found.length; j++)
      if (asked[i] === found[j]) {
        now[j + 1] = before[j] + 1
        if (now[j + 1] > best) [best, end] = [now[j + 1], i + 1]
      }
    before = now
  }
  return asked.slice(end - best, end)
}

// How much a run tells: rare pairs of words tell more.
function weight(list) {
  return pairs(list).reduce((sum, pair) => sum + Math.log((sections.length + 1) / (known.get(pair) ?? 1)), 0)
}

function holding(text) {
  const asked = words(text).slice(0, 400)
  if (asked.length < 2) return []
  const found = []
  for (const section of sections) {
    const symptom = run(asked, words(plain(section.symptom)))
    const anywhere = asked.length < ENOUGH_WORDS ? symptom : run(asked, section.words)
    const needed = Math.min(ENOUGH_WORDS, asked.length)
    if (anywhere.length < needed) continue
    found.push({ section, match: anywhere, score: weight(anywhere), rank: section.entry + (symptom.length >= needed ? 2 : 0) })
  }
  const best = Math.max(...found.map(one => one.score), 0)
  return found.filter(one => one.score >= 0.8 * best).sort((a, b) => b.rank - a.rank || b.score - a.score).slice(0, AT_MOST)
}

function shown({ section, match }) {
  if (zensical) return { id: section.id, matches: [] }
  const wanted = match.join(" ")
  const block = [section.symptom, ...section.blocks].find(one => words(plain(one)).join(" ").includes(wanted)) ?? section.symptom
  return { ...section.document, parent: section.parent, text: block, score: Number.MAX_VALUE, terms: {} }
}

function merged(result) {
  if (zensical) {
    const own = new Set(first.map(one => one.id))
    return { ...result, items: [...first, ...result.items.filter(one => !own.has(one.id))] }
  }
  const places = new Set(first.map(one => one.location))
  const rest = result.items.map(group => group.filter(one => !places.has(one.location) || !one.location.includes("#")))
  return { ...result, items: [...first.map(one => [one]), ...rest.filter(group => group.length > 0)] }
}

addEventListener("message", event => {
  const { type, data } = event.data
  if (type === SETUP) {
    zensical = data.docs === undefined
    prepare(zensical ? data.items : data.docs)
  }
  if (type === QUERY && event.isTrusted) {
    const asked = zensical ? plain(data.input) : data // Zensical writes < as &lt;
    first = holding(asked).map(shown)
    if (first.length > 0) {
      // The theme's search gets the words alone: in a message a colon is no command.
      const alone = words(asked).join(" ")
      event.stopImmediatePropagation()
      dispatchEvent(new MessageEvent("message", { data: { type, data: zensical ? { ...data, input: alone } : alone } }))
    }
  }
})

const send = self.postMessage.bind(self)
self.postMessage = message => send(message.type === RESULT ? { ...message, data: merged(message.data) } : message)

importScripts(location.search.slice(1))
