package main

import (
	"bytes"
	"fmt"
	"html"
	"image"
	"image/color"
	"image/draw"
	"image/png"
	"strings"

	"golang.org/x/image/font"
	"golang.org/x/image/font/basicfont"
	"golang.org/x/image/math/fixed"
)

func (rep *report) table() string {
	var b strings.Builder
	fmt.Fprintf(&b, "# Servin beside the others\n\n%s UTC, %d × %s, kernel %s, %d alternations for the latencies.\n", rep.Date, rep.CPUs, rep.CPU, rep.Kernel, rep.N)
	for _, r := range rep.Rows {
		fmt.Fprintf(&b, "\n## %s (%s, %s is better)\n\n", r.Name, r.Unit, r.Better)
		if r.Bar != "" {
			fmt.Fprintf(&b, "Bar: %s.\n\n", r.Bar)
		}
		b.WriteString("| | p50 | p95 | n | ratio to servin |\n|---|---|---|---|---|\n")
		ours := quantile(r.Samples["servin"], 0.5)
		for _, who := range r.Order {
			s := r.Samples[who]
			ratio := "–"
			if who != "servin" && ours > 0 && len(s) > 0 {
				q := quantile(s, 0.5) / ours
				if r.Better == "more" {
					q = ours / quantile(s, 0.5)
				}
				ratio = fmt.Sprintf("%.2f", q)
			}
			fmt.Fprintf(&b, "| %s | %.2f | %.2f | %d | %s |\n", who, quantile(s, 0.5), quantile(s, 0.95), len(s), ratio)
			if why := r.Failures[who]; why != "" {
				fmt.Fprintf(&b, "| %s failed | %s | | | |\n", who, strings.ReplaceAll(why, "\n", " "))
			}
		}
	}
	return b.String()
}

// plot geometry, in pixels.
const (
	plotWidth, labelWidth, barHeight, rowGap = 960, 330, 14, 30
)

type bar struct {
	y        int
	width    int
	label    string
	value    string
	headline bool
	ours     bool
}

// bars lays the plot out once for both forms: in each row the longest bar fills the width.
func (rep *report) bars() (out []bar, height int) {
	y := 20
	for _, r := range rep.Rows {
		out = append(out, bar{y: y, label: fmt.Sprintf("%s (%s, %s is better)", r.Name, r.Unit, r.Better), headline: true})
		y += 18
		longest := 0.0
		for _, who := range r.Order {
			longest = max(longest, quantile(r.Samples[who], 0.5))
		}
		for _, who := range r.Order {
			v := quantile(r.Samples[who], 0.5)
			w := 1
			if longest > 0 {
				w = max(1, int(v/longest*float64(plotWidth-labelWidth-110)))
			}
			out = append(out, bar{y: y, width: w, label: who, value: fmt.Sprintf("%.2f", v), ours: who == "servin"})
			y += barHeight + 4
		}
		y += rowGap - 16
	}
	return out, y + 10
}

var oursColour, theirsColour, ink = color.RGBA{0x0a, 0x7d, 0x55, 255}, color.RGBA{0x9a, 0xa5, 0xb1, 255}, color.RGBA{0x22, 0x22, 0x22, 255}

func (rep *report) svg() []byte {
	bars, h := rep.bars()
	var b bytes.Buffer
	fmt.Fprintf(&b, `<svg xmlns="http://www.w3.org/2000/svg" width="%d" height="%d" font-family="sans-serif" font-size="12"><rect width="100%%" height="100%%" fill="#fff"/>`, plotWidth, h)
	for _, x := range bars {
		if x.headline {
			fmt.Fprintf(&b, `<text x="12" y="%d" font-weight="bold">%s</text>`, x.y+11, html.EscapeString(x.label))
			continue
		}
		c := theirsColour
		if x.ours {
			c = oursColour
		}
		fmt.Fprintf(&b, `<text x="%d" y="%d" text-anchor="end">%s</text><rect x="%d" y="%d" width="%d" height="%d" fill="#%02x%02x%02x"/><text x="%d" y="%d">%s</text>`,
			labelWidth-8, x.y+11, html.EscapeString(x.label), labelWidth, x.y, x.width, barHeight, c.R, c.G, c.B, labelWidth+x.width+6, x.y+11, x.value)
	}
	b.WriteString("</svg>\n")
	return b.Bytes()
}

func (rep *report) png() []byte {
	bars, h := rep.bars()
	img := image.NewRGBA(image.Rect(0, 0, plotWidth, h))
	draw.Draw(img, img.Bounds(), image.White, image.Point{}, draw.Src)
	text := func(x, y int, s string) {
		d := font.Drawer{Dst: img, Src: image.NewUniform(ink), Face: basicfont.Face7x13, Dot: fixed.P(x, y)}
		// The face has ASCII only.
		d.DrawString(strings.NewReplacer("×", "x", "–", "-").Replace(s))
	}
	for _, x := range bars {
		if x.headline {
			text(12, x.y+11, x.label)
			continue
		}
		c := theirsColour
		if x.ours {
			c = oursColour
		}
		text(labelWidth-8-7*len(x.label), x.y+11, x.label)
		draw.Draw(img, image.Rect(labelWidth, x.y, labelWidth+x.width, x.y+barHeight), image.NewUniform(c), image.Point{}, draw.Src)
		text(labelWidth+x.width+6, x.y+11, x.value)
	}
	var b bytes.Buffer
	if err := png.Encode(&b, img); err != nil {
		return nil
	}
	return b.Bytes()
}
