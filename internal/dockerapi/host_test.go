package dockerapi

import (
	"net/http"
	"net/http/httptest"
	"net/url"
	"strings"
	"testing"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// TestActAsHost keeps what makes a caller root of the host by another way than a container from whom a policy denies it.
func TestActAsHost(t *testing.T) {
	f := &fake{mayNot: fault.New(fault.Forbidden, "policy rule %q", "no-root")}
	_, c := serveFake(t, f)
	for _, call := range [][2]string{{"POST", "/servin/os/upgrade?unsigned=1"}, {"POST", "/servin/os/rollback"}, {"POST", "/servin/os/reboot"}, {"PUT", "/servin/os/config"}, {"POST", "/servin/os/recovery"}, {"GET", "/servin/os/log"}} {
		req, err := http.NewRequestWithContext(t.Context(), call[0], "http://engine"+call[1], strings.NewReader("tar"))
		if err != nil {
			t.Fatal(err)
		}
		res, err := c.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		res.Body.Close()
		if res.StatusCode != http.StatusForbidden {
			t.Errorf("%s: %s", call, res.Status)
		}
	}
	res, err := c.Get("http://engine/servin/os/status")
	if err != nil || res.StatusCode != http.StatusOK {
		t.Fatalf("looking at it: %v %v", res, err)
	}
	res.Body.Close()
}

// TestToldOfChanges has in the audit log how the system was changed, without what an address may hide.
func TestToldOfChanges(t *testing.T) {
	q := url.Values{"url": {"https://me:secret@mirror/cloudos.release?token=secret"}, "unsigned": {"1"}, "downgrade": {"true"}, "reboot": {"1"}}
	hr := httptest.NewRequest("POST", "/servin/os/upgrade?"+q.Encode(), nil)
	told := (&request{Request: hr, query: q}).told()
	if told["url"] != "mirror/cloudos.release" || told["unsigned"] != "1" || told["downgrade"] != "true" || told["reboot"] != "1" {
		t.Errorf("told: %v", told)
	}
}
