// Package match compares an inventory with a database of known vulnerabilities, with
// grype's matchers, and reports what was found. Stages use it inside the sandbox.
package match

import (
	"context"
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/anchore/clio"
	"github.com/anchore/grype/grype"
	v6 "github.com/anchore/grype/grype/db/v6"
	"github.com/anchore/grype/grype/match"
	"github.com/anchore/grype/grype/matcher"
	"github.com/anchore/grype/grype/matcher/dpkg"
	"github.com/anchore/grype/grype/matcher/rpm"
	"github.com/anchore/grype/grype/matcher/stock"
	"github.com/anchore/grype/grype/pkg"
	gjson "github.com/anchore/grype/grype/presenter/json"
	"github.com/anchore/grype/grype/presenter/models"
	"github.com/anchore/grype/grype/presenter/sarif"
	"github.com/anchore/grype/grype/version"
	"github.com/anchore/grype/grype/vulnerability"
	"github.com/anchore/syft/syft"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Formats are the forms of a report.
var Formats = []string{"table", "json", "sarif"}

// Severities from the least on, as --fail-on takes them.
var Severities = []string{"negligible", "low", "medium", "high", "critical"}

// Options of Report.
type Options struct {
	Database string // the file
	Format   string
	// FailOn is the least severity that makes Report answer true.
	FailOn string
	// FixedOnly leaves out what has no fix.
	FixedOnly bool
	Version   string // of this program
	Now       time.Time
}

// Report writes what is known against the packages of an inventory, and tells
// whether anything is as severe as asked.
func Report(ctx context.Context, inventory io.ReadSeeker, o Options, w io.Writer) (severe bool, err error) {
	if !slices.Contains(Formats, o.Format) {
		return false, fault.New(fault.Invalid, "cannot write format %q: choose one of %s", o.Format, strings.Join(Formats, ", "))
	}
	if o.FailOn != "" && !slices.Contains(Severities, o.FailOn) {
		return false, fault.New(fault.Invalid, "%q is no severity: choose one of %s", o.FailOn, strings.Join(Severities, ", "))
	}
	rdr, built, err := Open(o.Database)
	if err != nil {
		return false, err
	}
	defer rdr.Close()
	known := v6.NewVulnerabilityProvider(rdr)
	cfg := pkg.ProviderConfig{SyftProviderConfig: pkg.SyftProviderConfig{SBOMOptions: syft.DefaultCreateSBOMConfig()}}
	packages, about, s, err := pkg.ProvideFromReader(inventory, cfg)
	if err != nil {
		return false, fault.As(fault.Invalid, fmt.Errorf("cannot read the inventory: %w", err))
	}
	m := grype.VulnerabilityMatcher{
		VulnerabilityProvider: known,
		Matchers: matcher.NewDefaultMatchers(matcher.Config{
			Stock: stock.MatcherConfig{UseCPEs: true},
			Dpkg:  dpkg.MatcherConfig{MissingEpochStrategy: version.MissingEpochStrategyZero},
			Rpm:   rpm.MatcherConfig{MissingEpochStrategy: version.MissingEpochStrategyAuto},
		}),
	}
	if o.FixedOnly {
		m.IgnoreRules = []match.IgnoreRule{
			{FixState: string(vulnerability.FixStateNotFixed)}, {FixState: string(vulnerability.FixStateWontFix)}, {FixState: string(vulnerability.FixStateUnknown)},
		}
	}
	found, ignored, err := m.FindMatchesContext(ctx, packages, about)
	if err != nil {
		return false, fmt.Errorf("cannot compare with the database: %w", err)
	}
	id := clio.Identification{Name: "servin-scan", Version: o.Version}
	doc, err := models.NewDocument(id, packages, about, *found, ignored, known, nil, map[string]any{"built": built.UTC().Format(time.RFC3339)}, models.SortByPackage, false, nil)
	if err != nil {
		return false, fmt.Errorf("cannot make the report: %w", err)
	}
	switch o.Format {
	case "json":
		err = gjson.NewPresenter(models.PresenterConfig{ID: id, Document: doc, SBOM: s, Pretty: true}).Present(w)
	case "sarif":
		err = sarif.NewPresenter(models.PresenterConfig{ID: id, Document: doc, SBOM: s, Pretty: true}).Present(w)
	default:
		err = table(doc, len(packages), built, o.Now, w)
	}
	return o.FailOn != "" && worst(doc) >= rank(o.FailOn), err
}

// Open opens a database and tells when it was built.
func Open(file string) (v6.Reader, time.Time, error) {
	if filepath.Base(file) != v6.VulnerabilityDBFileName {
		return nil, time.Time{}, fault.New(fault.Invalid, "cannot open the database %s: its name must be %s", file, v6.VulnerabilityDBFileName)
	}
	rdr, err := v6.NewReader(v6.Config{DBDirPath: filepath.Dir(file)})
	if err != nil {
		return nil, time.Time{}, fault.New(fault.Invalid, "cannot open the vulnerability database: %w; it must be one of schema %d", err, v6.ModelVersion)
	}
	meta, err := rdr.GetDBMetadata()
	if err != nil || meta.BuildTimestamp == nil {
		_ = rdr.Close()
		return nil, time.Time{}, fault.New(fault.Invalid, "cannot open the vulnerability database: it does not say when it was built")
	}
	return rdr, *meta.BuildTimestamp, nil
}

// rank of a severity; unknown ones are below all.
func rank(s string) int { return slices.Index(Severities, strings.ToLower(s)) }

func worst(d models.Document) int {
	most := -1
	for _, m := range d.Matches {
		most = max(most, rank(m.Vulnerability.Severity))
	}
	return most
}
