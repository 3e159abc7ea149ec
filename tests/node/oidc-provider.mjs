// A real OpenID provider for tests/integration/test_identity_oidc.py. Its keys come from the file named by argv[2], which
// the test rewrites to rotate them; it prints its issuer when it listens. Device codes are approved by POST /test/approve.
import { readFileSync } from 'node:fs';
import http from 'node:http';
import { Provider } from 'oidc-provider';

const [, , keysFile, portText] = process.argv;
const port = Number(portText);
const issuer = `http://127.0.0.1:${port}`;
const apiResource = 'https://strongroom.test';
const claims = { sub: 'ana', tenant: 'acme', groups: ['developers'] };

const configuration = {
  jwks: JSON.parse(readFileSync(keysFile, 'utf8')),
  clients: [
    {
      client_id: 'robot', id_token_signed_response_alg: 'ES256', client_secret: 'robot-secret-robot-secret-robot-secret', redirect_uris: [], response_types: [],
      grant_types: ['client_credentials'], scope: 'strongroom.use strongroom.admin',
    },
    {
      client_id: 'ide', id_token_signed_response_alg: 'ES256', token_endpoint_auth_method: 'none', redirect_uris: [], response_types: [],
      grant_types: ['urn:ietf:params:oauth:grant-type:device_code', 'refresh_token'], application_type: 'native',
      scope: 'openid offline_access strongroom.use',
    },
  ],
  scopes: ['openid', 'offline_access', 'strongroom.use', 'strongroom.admin'],
  findAccount: (ctx, id) => ({ accountId: id, claims: () => ({ sub: id }) }),
  ttl: { ClientCredentials: 600, AccessToken: 600, DeviceCode: 120, Grant: 600, RefreshToken: 600 },
  issueRefreshToken: () => true,
  extraTokenClaims: (ctx, token) => ({ tenant: claims.tenant, groups: claims.groups }),
  features: {
    clientCredentials: { enabled: true },
    deviceFlow: { enabled: true },
    devInteractions: { enabled: false },
    resourceIndicators: {
      enabled: true,
      defaultResource: () => apiResource,
      useGrantedResource: () => true,
      getResourceServerInfo: () => ({
        scope: 'strongroom.use strongroom.admin',
        audience: apiResource,
        accessTokenFormat: 'jwt',
        jwt: { sign: { alg: process.env.TOKEN_ALG ?? 'ES256' } },
      }),
    },
  },
};

const provider = new Provider(issuer, configuration);
const counts = { jwks: 0, discovery: 0 };

async function approve(userCode) {
  const normalised = userCode.replace(/[^A-Za-z0-9]/g, '').toUpperCase();
  const code = await provider.DeviceCode.findByUserCode(normalised);
  const grant = new provider.Grant({ accountId: claims.sub, clientId: code.clientId });
  grant.addOIDCScope('openid offline_access');
  grant.addResourceScope(apiResource, 'strongroom.use');
  code.accountId = claims.sub;
  code.grantId = await grant.save();
  code.scope = 'openid offline_access strongroom.use';
  code.resource = apiResource;
  code.authTime = Math.floor(Date.now() / 1000);
  await code.save();
}

const server = http.createServer(async (request, response) => {
  const url = new URL(request.url, issuer);
  if (url.pathname === '/test/counts') {
    response.end(JSON.stringify(counts));
    return;
  }
  if (url.pathname === '/test/approve') {
    try {
      await approve(url.searchParams.get('user_code'));
      response.end('{}');
    } catch (error) {
      response.statusCode = 500;
      response.end(String(error.stack));
    }
    return;
  }
  if (url.pathname === '/jwks') counts.jwks += 1;
  if (url.pathname.startsWith('/.well-known/')) counts.discovery += 1;
  provider.callback()(request, response);
});
server.listen(port, '127.0.0.1', () => console.log(issuer));
