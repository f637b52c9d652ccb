package build

import (
	"net/http"
	"os"
	"strings"
	"testing"
)

// TestPolicyOfPrivileges holds builds to a policy: a step that asks for the host's privileges or network is a
// container that asks for them.
func TestPolicyOfPrivileges(t *testing.T) {
	file := t.TempDir() + "/policy.yaml"
	if err := os.WriteFile(file, []byte("version: 1\nrules:\n  - name: no-root\n    privileged: deny\n    hostNamespaces: {allow: []}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	e := start(t, "policy: "+file+"\n")
	plain := e.context(map[string]string{"Dockerfile": "FROM bb\nRUN true\n"})
	insecure := e.context(map[string]string{"Dockerfile": "# syntax is built in\nFROM bb\nRUN --security=insecure ls /dev/kmsg\n"})
	host := e.context(map[string]string{"Dockerfile": "FROM bb\nRUN --network=host true\n"})
	if r := e.servin("build", "-t", "plain", plain); r.code != 0 {
		t.Errorf("an ordinary build: %s", r)
	}
	for name, args := range map[string][]string{
		"privileges":        {"--allow", "security.insecure", insecure},
		"the host's":        {"--allow", "network.host", host},
		"the host's, named": {"--network", "host", plain},
		"both":              {"--allow", "network.host", "--allow", "security.insecure", plain},
	} {
		if r := e.servin(append([]string{"build", "--no-cache"}, args...)...); r.code == 0 || !strings.Contains(r.all(), `policy rule "no-root"`) {
			t.Errorf("%s: %s", name, r)
		}
	}
	// Nor without asking, nor by saying that nobody confines the client.
	if r := e.servin("build", "--no-cache", insecure); r.code == 0 {
		t.Errorf("privileges that were not asked for: %s", r)
	}
	req, err := http.NewRequest("POST", "http://engine/build?networkmode=host&remote=", strings.NewReader(""))
	if err != nil {
		t.Fatal(err)
	}
	req.Header["Servin-Confined"] = []string{""}
	resp, err := e.HTTP().Do(req)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != http.StatusForbidden {
		t.Errorf("the classic builder, in the host's network: %s", resp.Status)
	}
}
