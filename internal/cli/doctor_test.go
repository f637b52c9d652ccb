package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/cloudos-io/cloudos/api"
)

// doctor --fix shows what can be done and does it on consent alone.
func TestDoctorFix(t *testing.T) {
	for name, c := range map[string]struct {
		args    []string
		actions []string
		asked   []string
		fails   bool
		says    string
	}{
		"look":          {nil, []string{"open x"}, nil, true, "findings are errors"},
		"not consented": {[]string{"--fix"}, []string{"open x"}, nil, true, "say --yes"},
		"consented":     {[]string{"--fix", "--yes"}, []string{"open x", "open y"}, []string{"open x", "open y"}, false, "Done: open y"},
		"nothing to do": {[]string{"--fix", "-y"}, nil, nil, true, "nothing that the engine could mend"},
	} {
		t.Run(name, func(t *testing.T) {
			var asked []string
			mux := http.NewServeMux()
			mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
				w.Header().Set("Api-Version", "1.50")
				switch {
				case strings.HasSuffix(r.URL.Path, "/servin/doctor"):
					l := []api.Finding{}
					if len(asked) == 0 {
						l = append(l, api.Finding{Severity: "error", Title: "bad"}, api.Finding{Severity: "error", Title: "worse"})
						for _, a := range c.actions {
							l = append(l, api.Finding{Severity: "warning", Title: "t", Action: a})
						}
					}
					json.NewEncoder(w).Encode(l)
				case strings.HasSuffix(r.URL.Path, "/servin/doctor/fix") && r.Method == http.MethodPost:
					var req api.FixRequest
					if err := json.NewDecoder(r.Body).Decode(&req); err != nil {
						t.Error(err)
					}
					asked = append(asked, req.Actions...)
					json.NewEncoder(w).Encode(api.FixReport{Done: req.Actions})
				}
			})
			sock := filepath.Join(t.TempDir(), "s")
			ln, err := net.Listen("unix", sock)
			if err != nil {
				t.Fatal(err)
			}
			srv := &http.Server{Handler: mux}
			go srv.Serve(ln)
			defer srv.Close()
			null, err := os.Open(os.DevNull)
			if err != nil {
				t.Fatal(err)
			}
			defer null.Close()
			var out, errs bytes.Buffer
			home := t.TempDir()
			code := Main(context.Background(), Config{
				Args: append([]string{"servin", "--host", "unix://" + sock, "system", "doctor"}, c.args...), Stdin: null, Stdout: &out, Stderr: &errs,
				Getenv: func(string) string { return "" }, LookupEnv: func(k string) (string, bool) { return home, k == "HOME" },
				Environ: func() []string { return nil }, Version: "0", Commit: func() string { return "" },
			})
			if (code != 0) != c.fails || !slices.Equal(asked, c.asked) || !strings.Contains(errs.String(), c.says) {
				t.Errorf("got %d, asked for %v\n%s%s", code, asked, out.String(), errs.String())
			}
		})
	}
}
