package inventory

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"

	"github.com/anchore/syft/syft/sbom"
)

// table writes the packages. syft's own table hands an image's escape sequences on to
// the terminal.
func table(s *sbom.SBOM, w io.Writer) error {
	var rows [][3]string
	for p := range s.Artifacts.Packages.Enumerate() {
		rows = append(rows, [3]string{Clean(p.Name), Clean(p.Version), Clean(string(p.Type))})
	}
	slices.SortFunc(rows, func(a, b [3]string) int {
		return cmp.Or(cmp.Compare(a[0], b[0]), cmp.Compare(a[1], b[1]), cmp.Compare(a[2], b[2]))
	})
	rows = slices.Compact(rows)
	tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
	fmt.Fprintln(tw, "PACKAGE\tVERSION\tTYPE")
	for _, r := range rows {
		fmt.Fprintf(tw, "%s\t%s\t%s\n", r[0], r[1], r[2])
	}
	return tw.Flush()
}

// Clean keeps an image's words from acting on a terminal, and short.
func Clean(s string) string {
	s = strings.Map(func(r rune) rune {
		if r < ' ' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return '.'
		}
		return r
	}, s)
	if r := []rune(s); len(r) > 80 {
		return string(r[:79]) + "…"
	}
	return s
}
