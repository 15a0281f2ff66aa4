// Draws each *.pikchr of this folder as *.svg: `node draw.mjs` after `npm install --no-save pikchr-wasm@2.0.1`.
// The colours follow the reader's dark or light mode; the source's SHA-256 in the SVG lets a test see a stale picture.
import { createHash } from "node:crypto";
import { readdirSync, readFileSync, writeFileSync } from "node:fs";
import pikchr from "pikchr-wasm";

const STYLE =
  "<style>svg{color:#1f2328;--paper:#fff;font-family:system-ui,sans-serif}" +
  "@media(prefers-color-scheme:dark){svg{color:#e6edf3;--paper:#0d1117}}</style>";
const FOLDER = new URL(".", import.meta.url);

await pikchr.loadWASM();
for (const name of readdirSync(FOLDER).filter((file) => file.endsWith(".pikchr"))) {
  const source = readFileSync(new URL(name, FOLDER), "utf8");
  const drawn = pikchr.render(source);
  if (!drawn.includes("<svg")) throw new Error(`${name}: ${drawn}`);
  const digest = createHash("sha256").update(source).digest("hex");
  const svg = drawn
    .replace(/<!--[\s\S]*?-->/g, "")
    .replace(/rgb\(0,0,0\)/g, "currentColor")
    .replace(/rgb\(255,255,255\)/g, "var(--paper)")
    .replace(/font-size="([\d.]+)%"/g, (_, percent) => `font-size="${(16 * percent) / 100}px"`)
    .replace(/(<svg[^>]*>)/, `$1\n<!-- ${name} sha256 ${digest} -->\n${STYLE}`);
  writeFileSync(new URL(name.replace(".pikchr", ".svg"), FOLDER), svg);
}
