package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/cli/command"
	"github.com/cloudos-io/cloudos/internal/cli/format"
)

func (a *App) cmdSBOM() *command.Command {
	var o scanFlags
	form, output := "", ""
	return &command.Command{Name: "sbom", Args: "IMAGE", Short: "Show what is installed in an image (its bill of materials)", Min: 1, Max: 1, Complete: []string{"image"},
		Example: `servin images sbom debian:12
servin images sbom --format spdx-json -o debian.spdx.json debian:12`,
		Flags: func(f *command.FlagSet) {
			f.String(&form, "format", "", "table, spdx-json, cyclonedx-json or syft-json (default table)").Of("sbomformat")
			f.String(&output, "output", "o", "Write to this file").Of("file")
			o.declare(f)
		},
		Run: func(ctx context.Context, args []string) error {
			if form == "" {
				form = "table"
			}
			inv, err := a.inventory(ctx, args[0], &o)
			if err != nil {
				return err
			}
			defer inv.Close()
			convert := func(w io.Writer) error {
				return a.scanner(ctx, inv, w, append([]string{"convert", "--format", form}, o.args()...)...)
			}
			if output == "" {
				return convert(a.out)
			}
			f, err := os.Create(output)
			if err != nil {
				return err
			}
			return errors.Join(convert(f), f.Close())
		}}
}

func (a *App) cmdScan() *command.Command {
	var o scanFlags
	form, db, failOn, url := "", "", "", ""
	asJSON, update, fixed := false, false, false
	return &command.Command{Name: "scan", Args: "[IMAGE]", Short: "Show what is known against the packages in an image", Max: 1, Complete: []string{"image"},
		Long: `Show what is known against the packages in an image.

The image is read once and its inventory kept under its digest; the database of
known vulnerabilities is grype's. Nothing is fetched but by --update-db.

Exit codes: 0 nothing as severe as --fail-on says, 2 something is, 3 there is no
database, 1 the scan failed.`,
		Example: `servin images scan --update-db
servin images scan --fail-on high web:1
servin images scan --db vulnerability-db.tar.zst --format sarif web:1 > web.sarif`,
		Flags: func(f *command.FlagSet) {
			f.String(&form, "format", "", "table, json or sarif (default table)").Of("scanformat")
			f.Bool(&asJSON, "json", "", "Print JSON: --format json")
			f.String(&failOn, "fail-on", "", "End with 2 for this severity or worse: negligible, low, medium, high, critical").Of("severity")
			f.Bool(&fixed, "only-fixed", "", "Leave out what has no fix")
			f.String(&db, "db", "", "The database: a vulnerability.db, its directory, or an archive of it").Of("file")
			f.Bool(&update, "update-db", "", "Fetch the newest database first; without an image, do that alone")
			f.String(&url, "db-url", "", "Fetch from here instead of where grype's databases are published")
			o.declare(f)
		},
		Run: func(ctx context.Context, args []string) error {
			switch {
			case len(args) == 0 && !update:
				return usagef("name an image, or fetch a database with --update-db")
			case asJSON && form != "" && form != "json":
				return usagef("--json and --format %s exclude each other", form)
			case update && db != "":
				return usagef("--update-db and --db exclude each other")
			case asJSON:
				form = "json"
			case form == "":
				form = "table"
			}
			if update {
				fetch := append([]string{"update-db"}, o.args()...)
				if url != "" {
					fetch = append(fetch, "--url", url)
				}
				to := io.Writer(a.Stderr)
				if len(args) == 0 {
					to = a.out
				}
				if err := a.scanner(ctx, nil, to, fetch...); err != nil || len(args) == 0 {
					return err
				}
			}
			inv, err := a.inventory(ctx, args[0], &o)
			if err != nil {
				return err
			}
			defer inv.Close()
			match := append([]string{"match", "--format", form}, o.args()...)
			for _, x := range [][2]string{{"--db", db}, {"--fail-on", failOn}} {
				if x[1] != "" {
					match = append(match, x[0], x[1])
				}
			}
			if fixed {
				match = append(match, "--only-fixed")
			}
			return a.scanner(ctx, inv, a.out, match...)
		}}
}

func (a *App) cmdVerify() *command.Command {
	var keys []string
	identity, issuer, root, attestation := "", "", "", ""
	asJSON := false
	return &command.Command{Name: "verify", Args: "IMAGE", Short: "Check who signed an image", Min: 1, Max: 1, Complete: []string{"image"},
		Long: `Check who signed an image: with cosign's signatures and attestations and Sigstore
bundles that its registry holds, fetched by the engine, judged here and offline.

A key needs nothing else. An identity (the subject of a certificate: an address of
mail, the URI of a workflow) needs its issuer, and the trusted root to check both
with. Patterns: * is anything but a slash, ** anything.`,
		Example: `servin images verify --key cosign.pub registry.example/web:1
servin images verify --identity 'https://github.com/acme/**' --issuer https://token.actions.githubusercontent.com \
  --trusted-root trusted_root.json registry.example/web:1`,
		Flags: func(f *command.FlagSet) {
			f.Strings(&keys, "key", "", "Accept signatures of this public key (PEM); several accept any").Of("file")
			f.String(&identity, "identity", "", "Accept certificates of this identity")
			f.String(&issuer, "issuer", "", "The issuer that vouches for the identity")
			f.String(&root, "trusted-root", "", "Sigstore's trusted_root.json; with a key, the signature must be in its log too").Of("file")
			f.String(&attestation, "attestation", "", "Want an attestation of this predicate type, and print it")
			f.Bool(&asJSON, "json", "", "Print the verdict as JSON")
		},
		Run: func(ctx context.Context, args []string) error {
			signers, err := readSigners(keys, identity, issuer, root)
			if err != nil {
				return err
			}
			c, err := a.client()
			if err != nil {
				return err
			}
			auth, err := a.auth(ctx, args[0])
			if err != nil {
				return err
			}
			sigs, err := c.ImageSignatures(ctx, args[0], auth)
			if err != nil {
				return err
			}
			req, err := json.Marshal(api.SignatureRequest{Signatures: sigs, Signers: signers, Attestation: attestation})
			if err != nil {
				return err
			}
			var out bytes.Buffer
			if err := a.scanner(ctx, bytes.NewReader(req), &bounded{w: &out, left: 256 << 20}, "verify"); err != nil {
				return err
			}
			var v api.SignatureVerdict
			if err := json.Unmarshal(out.Bytes(), &v); err != nil {
				return fmt.Errorf("cannot read the verdict: %w", err)
			}
			return a.showVerdict(args[0], v, attestation != "", asJSON)
		}}
}

const maxSignerFile = 4 << 20

func readSigners(keys []string, identity, issuer, root string) ([]api.SignatureSigner, error) {
	if (identity == "") != (issuer == "") {
		return nil, usagef("--identity and --issuer need each other: anybody can have any identity vouched for by somebody")
	}
	if len(keys) == 0 && identity == "" {
		return nil, usagef("say whose signature to accept: --key FILE, or --identity and --issuer")
	}
	if identity != "" && root == "" {
		return nil, usagef("--identity needs --trusted-root FILE: what its certificate is checked with")
	}
	var trusted []byte
	var err error
	if root != "" {
		if trusted, err = readBounded(root); err != nil {
			return nil, fmt.Errorf("cannot read the trusted root: %w", err)
		}
	}
	var out []api.SignatureSigner
	for _, k := range keys {
		pem, err := readBounded(k)
		if err != nil {
			return nil, fmt.Errorf("cannot read the key: %w", err)
		}
		out = append(out, api.SignatureSigner{Key: pem, TrustedRoot: trusted})
	}
	if identity != "" {
		out = append(out, api.SignatureSigner{Identity: identity, Issuer: issuer, TrustedRoot: trusted})
	}
	return out, nil
}

func readBounded(file string) ([]byte, error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	b, err := io.ReadAll(io.LimitReader(f, maxSignerFile+1))
	if err == nil && len(b) > maxSignerFile {
		err = fmt.Errorf("%s is larger than %d bytes", file, maxSignerFile)
	}
	return b, err
}

func (a *App) showVerdict(image string, v api.SignatureVerdict, attestation, asJSON bool) error {
	var failed error
	if len(v.Verified) == 0 {
		why := ""
		if len(v.Problems) > 0 {
			why = ": " + strings.Join(v.Problems, "; ")
		}
		failed = fmt.Errorf("%s is not signed as wanted%s", image, why)
	}
	if asJSON {
		return errors.Join(format.JSONLines(a.out, []api.SignatureVerdict{v}), failed)
	}
	for _, s := range v.Verified {
		who := "key " + s.Key
		if s.Key == "" {
			who = s.Identity + " (" + s.Issuer + ")"
		}
		when := ""
		if s.Time != nil {
			when = ", " + s.Time.Format(time.RFC3339)
		}
		what := "signed by"
		if attestation {
			what = s.PredicateType + " by"
		}
		fmt.Fprintf(a.out, "%s %s %s%s\n", s.Digest, what, who, when)
		if attestation {
			fmt.Fprintf(a.out, "%s\n", s.Statement)
		}
	}
	return failed
}
