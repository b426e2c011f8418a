"use strict";
const make = (tag, text, ...children) => {
  const element = document.createElement(tag);
  element.textContent = text;
  element.append(...children);
  return element;
};

function keys(schema, schemas) {
  const list = document.createElement("ul");
  for (const [name, about] of Object.entries(schema.properties || {})) {
    const kinds = (about.anyOf || [about]).map(kind => kind.type || "value").filter(kind => kind !== "null");
    const needed = (schema.required || []).includes(name) ? ", needed" : "";
    const item = make("li", "", make("code", name), ` ${[...new Set(kinds)].join(" or ")}${needed}. ${about.description || ""}`);
    list.append(item);
  }
  return list;
}

fetch("openapi.json").then(answer => answer.json()).then(api => {
  const schemas = api.components.schemas;
  for (const [path, methods] of Object.entries(api.paths)) {
    for (const [method, about] of Object.entries(methods)) {
      const section = make("section", "", make("h2", `${method.toUpperCase()} ${path}`), make("p", about.summary));
      section.className = "wide";
      const reference = about.requestBody?.content["application/json"].schema.$ref.split("/").pop();
      if (reference) section.append(make("p", schemas[reference].description), keys(schemas[reference], schemas));
      document.getElementById("endpoints").append(section);
    }
  }
  document.documentElement.dataset.check = "ok";
});
