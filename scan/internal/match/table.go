package match

import (
	"cmp"
	"fmt"
	"io"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/anchore/grype/grype/presenter/models"

	"github.com/cloudos-io/cloudos/scan/internal/inventory"
)

// old is the age from which a database is worth a word.
const old = 5 * 24 * time.Hour

// row is a line of the table.
type row struct {
	name, installed, fixed, kind, id, severity string
}

// table writes the matches, the worst first, and a line that sums up.
func table(d models.Document, packages int, built, now time.Time, w io.Writer) error {
	var rows []row
	for _, m := range d.Matches {
		r := row{inventory.Clean(m.Artifact.Name), inventory.Clean(m.Artifact.Version), inventory.Clean(strings.Join(m.Vulnerability.Fix.Versions, ", ")), inventory.Clean(string(m.Artifact.Type)), inventory.Clean(m.Vulnerability.ID), m.Vulnerability.Severity}
		if r.fixed == "" {
			r.fixed = "-"
			if m.Vulnerability.Fix.State == "wont-fix" {
				r.fixed = "(won't fix)"
			}
		}
		rows = append(rows, r)
	}
	slices.SortFunc(rows, func(a, b row) int {
		return cmp.Or(cmp.Compare(rank(b.severity), rank(a.severity)), cmp.Compare(a.name, b.name), cmp.Compare(a.id, b.id), cmp.Compare(a.installed, b.installed))
	})
	rows = slices.Compact(rows)
	if len(rows) > 0 {
		tw := tabwriter.NewWriter(w, 0, 0, 3, ' ', 0)
		fmt.Fprintln(tw, "PACKAGE\tINSTALLED\tFIXED IN\tTYPE\tVULNERABILITY\tSEVERITY")
		for _, r := range rows {
			fmt.Fprintf(tw, "%s\t%s\t%s\t%s\t%s\t%s\n", r.name, r.installed, r.fixed, r.kind, r.id, r.severity)
		}
		if err := tw.Flush(); err != nil {
			return err
		}
		fmt.Fprintln(w)
	}
	count := map[string]int{}
	for _, r := range rows {
		count[r.severity]++
	}
	var parts []string
	for _, s := range []string{"Critical", "High", "Medium", "Low", "Negligible", "Unknown"} {
		if count[s] > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", count[s], strings.ToLower(s)))
		}
	}
	sum := "no known vulnerability"
	if len(rows) > 0 {
		sum = fmt.Sprintf("%d known vulnerabilities (%s)", len(rows), strings.Join(parts, ", "))
		if len(rows) == 1 {
			sum = fmt.Sprintf("1 known vulnerability (%s)", strings.Join(parts, ""))
		}
	}
	_, err := fmt.Fprintf(w, "%d packages, %s; database of %s\n", packages, sum, built.UTC().Format(time.DateOnly))
	if err == nil && now.Sub(built) > old {
		_, err = fmt.Fprintf(w, "The database is %d days old: servin images scan --update-db\n", int(now.Sub(built).Hours()/24))
	}
	return err
}
